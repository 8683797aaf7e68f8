"""Hand a model over to vLLM: its server, with the template and the stop tokens that the model was taught."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from instil.errors import ModelError, UsageError
from instil.training.files import RECORD

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM knows
_TEMPLATE, _TOOL_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# What vLLM cannot compute, or leaves out in silence, by its name in an adapter's configuration.
_BEYOND = {
    "modules_to_save": "it holds whole layers ({})",
    "trainable_token_indices": "it trained embeddings of new tokens ({})",
    "use_dora": "it is one of DoRA",
    "lora_bias": "it has biases",
    "rank_pattern": "its layers have other ranks ({})",
    "alpha_pattern": "its layers are scaled otherwise ({})",
    "target_parameters": "it adapts parameters that are no layer ({})",
    "layer_replication": "it repeats layers ({})",
}
_NOTES = (
    "vLLM serves: no page, no recording, no feedback and no list of runs",
    "with vLLM the text of a message that spells a control token is read as that token",
    "with vLLM tool calls stay text in the answer, and /v1/completions takes no suffix",
    "vLLM looks at neither Host nor Origin, and its limits are its own",
)
_OF_KEY = (
    "vLLM asks for the API key under /v1 alone: /tokenize, /invocations and others are open (see its security guide)"
)


def hand_over(
    model: str,
    *,
    host: str,
    port: int,
    name: str,
    api_key: str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    trust_remote_code: bool = False,
    template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    ignored: Collection[str] = (),
) -> NoReturn:
    """Become vLLM's server; what it does otherwise than Instil's is said on standard error.

    Args:
        model: A folder or a hub name, of a whole model or of an adapter.
        host: The address to listen at.
        port: The port.
        name: What the model is called by those who ask.
        api_key: What they must show. It goes through the environment, for everyone may read a command line.
        precision: What products are computed in; auto: what the model is stored in, as vLLM has it.
        trust_remote_code: Run the code that comes with the model.
        template: A `.jinja` file with a chat template in place of the model's own.
        template_args: Its arguments, before those that the model was trained with.
        ignored: The flags that were given and that vLLM knows nothing of.

    Raises:
        UsageError: vLLM is not installed, there are such flags or no such file, or it cannot serve the adapter.
        ModelError: There is no such model.
    """
    if ignored:
        raise UsageError(
            f"--engine vllm: {', '.join(ignored)} would do nothing: vLLM has no such thing",
            "Leave them out, or let Instil's own engine serve: leave --engine vllm out.",
        )
    program = _program()
    arguments = command(
        model,
        host=host,
        port=port,
        name=name,
        precision=precision,
        trust_remote_code=trust_remote_code,
        template=template,
        template_args=template_args,
    )
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
    notes = [*_NOTES, *_record(Path(model)).get("notes", [])]  # what plain transformers does otherwise, vLLM does too
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
        notes.append(_OF_KEY)
    sys.stderr.write("".join(f"instil: note: {note}\n" for note in notes) + f"instil: {shlex.join(arguments)}\n")
    sys.stderr.flush()
    os.execve(program, arguments, environment)


def command(
    model: str,
    *,
    host: str,
    port: int,
    name: str,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    trust_remote_code: bool = False,
    template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> list[str]:
    """The command that serves a model as `hand_over` does, but for the environment.

    Raises:
        UsageError: vLLM cannot serve the adapter, or there is no such template.
        ModelError: There is no such model.
    """
    if template is not None and not Path(template).is_file():
        raise UsageError(
            f"--engine vllm: --template {template}: is no file",
            "Name a .jinja file, or leave it out: a tuned model has its own.",
        )
    from instil.model.load import adapter_config, base_of
    from instil.model.options import ModelOptions

    adapter = adapter_config(model)
    folder, served = (Path(model), model) if adapter is None else (adapter[0], base_of(ModelOptions(model=model)))
    found = ["vllm", "serve", served, "--host", host, "--port", str(port), "--allowed-origins", "[]"]
    if adapter is None:
        found += ["--served-model-name", name]
    else:
        found += ["--served-model-name", f"{name}-base", *_adapted(*adapter, name)]
        if (folder / "tokenizer.json").is_file():
            found += ["--tokenizer", str(folder)]
    if template is None and not (folder / _TOOL_TEMPLATES).is_dir():  # with another one for tools, vLLM chooses
        own = folder / _TEMPLATE
        template = str(own) if own.is_file() else None
    if template is not None:
        found += ["--chat-template", template]
    arguments = {**_record(folder).get("template", {}).get("arguments", {}), **(template_args or {})}
    if arguments:
        found += ["--default-chat-template-kwargs", json.dumps(arguments)]
    if (folder / "generation_config.json").is_file():  # holds the stop tokens
        found += ["--generation-config", str(folder)]
    if precision in _DTYPES:
        found += ["--dtype", _DTYPES[precision]]
    return found + (["--trust-remote-code"] if trust_remote_code else [])


def _program() -> str:
    """Where vLLM is: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if found is None:
        raise UsageError("--engine vllm: vLLM is not installed", "pip install vllm")
    return found


def _adapted(folder: Path, config: Mapping[str, Any], name: str) -> list[str]:
    """The arguments that have an adapter served beside its base."""
    beyond = [text.format(_named(config[key])) for key, text in _BEYOND.items() if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        beyond.append(f"it is one of {config['peft_type']}, not LoRA")
    if config.get("bias", "none") != "none":
        beyond.append(f"it trained biases ({config['bias']})")
    rank = config.get("r")
    room = next((each for each in _RANKS if isinstance(rank, int) and each >= rank), None)
    if room is None:
        beyond.append(f"its rank is {rank}, and {_RANKS[-1]} the greatest")
    if beyond:
        raise UsageError(
            f"--engine vllm: {folder}: vLLM cannot serve this adapter: {'; '.join(beyond)}",
            "Merge it first (instil train --merge-adapter writes a merged model, peft's merge_and_unload makes one); "
            "or leave --engine vllm out: Instil's own engine serves it.",
        )
    module = {"name": name, "path": str(folder), "base_model_name": f"{name}-base"}
    return ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", json.dumps(module)]


def _named(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | dict) else str(value)


def _record(folder: Path) -> Mapping[str, Any]:
    """What stands in the folder of how the model was trained."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not JSON: {error}", "Mend or remove the file.") from error
    return found if isinstance(found, dict) else {}
