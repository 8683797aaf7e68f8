"""`instil serve`: a tuned model behind OpenAI's API, with a page to talk to it, and what people make of its answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, model_validator

from instil.cli.generating import LoadOptions
from instil.errors import UsageError
from instil.prompt.options import PromptOptions, arguments

if TYPE_CHECKING:
    from instil.inference.load import Loaded
    from instil.serving.models import ServedModel

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEY = "INSTIL_API_KEY"
_OF_PROMPTS = PromptOptions.model_fields


class ServeOptions(LoadOptions):
    """Everything that `instil serve` takes."""

    base: str | None = Field(default=None, description="The model it was tuned from, to be asked beside it.")
    name: str | None = Field(default=None, description="What clients call the model; the name of its folder.")
    template: str | None = Field(default=None, description=_OF_PROMPTS["template"].description)
    template_args: Annotated[dict[str, Any], BeforeValidator(arguments)] = Field(
        default_factory=dict, description=_OF_PROMPTS["template_args"].description
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; beyond the loopback it takes a key.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: str | None = Field(
        default=None, description=f"What clients must name; better in the environment, as {_KEY}."
    )
    allow_host: list[str] = Field(default_factory=list, description="Further names that the server is asked under.")
    max_new_tokens: int = Field(default=4096, ge=1, description="Most tokens of an answer, whatever is asked for.")
    max_batch: int = Field(default=64, ge=1, description="Most answers generated at once; fewer if memory is short.")
    max_waiting: int = Field(default=128, ge=0, description="Most answers that wait; beyond, requests get a 429.")
    max_body: int = Field(default=4 * 2**20, ge=1024, description="Most bytes of a request's body.")
    drain: float = Field(
        default=30.0, ge=0.0, allow_inf_nan=False, description="Seconds that answers under way are given upon Ctrl-C."
    )
    record: str | None = Field(
        default=None, description="Record requests and what people make of the answers: a folder, or a database's URL."
    )
    consent: Literal["each", "all"] = Field(
        default="each",
        description="each: only requests that say store: true are recorded; all: those that do not say store: false.",
    )
    redact: bool = Field(default=True, description="Take e-mail addresses, phone and card numbers out of what is kept.")
    phone_region: str = Field(default="US", description="Country whose phone numbers are known without a country code.")
    retention_days: int | None = Field(default=None, ge=1, description="Delete what was recorded before that.")
    runs: Path | None = Field(default=None, description="Show the training runs below this folder at /runs.")
    engine: Literal["instil", "vllm"] = Field(
        default="instil", description="vllm: hand over to vLLM, with the model's template and stop tokens."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ServeOptions:
        if self.host not in _LOOPBACK and self.key is None:
            raise UsageError(
                f"--host {self.host}: others could ask the model, and no key is set",
                f"Set {_KEY} (or --api-key), or leave --host out.",
            )
        if self.record is None:
            for name in ("consent", "redact", "phone_region", "retention_days"):
                if name in self.model_fields_set:
                    raise UsageError(f"--{name.replace('_', '-')}: is for what is recorded", "Give --record DIR.")
        return self

    @property
    def key(self) -> str | None:
        """What clients must name; None for nothing."""
        return self.api_key or os.environ.get(_KEY) or None

    @property
    def shown_name(self) -> str:
        """What clients call the model."""
        return self.name or Path(self.model).resolve().name or self.model

    def load(self) -> tuple[Loaded, Loaded | None]:
        """The model, and its base."""
        from instil.inference.load import load_base, load_engine

        prompt = PromptOptions(template=self.template, template_args=self.template_args)
        tuned = load_engine(self.of(self.model), prompt)
        return tuned, load_base(self.of(self.base), tuned) if self.base else None


def serve(*, options: Annotated[ServeOptions, Parameter(name="*")]) -> None:
    """Serve a model: OpenAI's API, a page to talk to it at /, what people make of its answers as data (--record).

    Settings may stand in a YAML file as well: --config FILE; flags override it.
    """
    if options.engine == "vllm":
        _hand_over(options)
        return
    try:
        from instil.serving.run import listen, run
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs the package {error.name!r}", "pip install 'instil[serve]'") from error
    with listen(options.host, options.port) as socket:
        run(_models(options), socket, options)


def _models(options: ServeOptions) -> list[ServedModel]:
    from instil.serving.models import ServedModel

    tuned, base = options.load()
    found = [ServedModel(options.shown_name, "tuned", tuned, options.max_new_tokens)]
    if base is not None:
        name = Path(options.base or "").resolve().name
        name = f"{name}-base" if name == options.shown_name else name
        found.append(ServedModel(name, "base", base, options.max_new_tokens))
    for model in found:
        if model.engine.one_by_one:
            sys.stderr.write(
                f"instil: note: {model.name}: answers are generated one by one: {model.engine.one_by_one}\n"
            )
        if model.chat is None:
            sys.stderr.write(f"instil: note: {model.no_chat}\n")
    return found


def _hand_over(options: ServeOptions) -> None:
    from instil.serving.vllm import hand_over

    shared = {"model", "host", "port", "name", "api_key", "precision", "trust_remote_code", "template", "template_args"}
    ignored = options.model_fields_set - shared - {"engine"}
    hand_over(
        options.model,
        host=options.host,
        port=options.port,
        name=options.shown_name,
        api_key=options.key,
        precision=options.precision,
        trust_remote_code=options.trust_remote_code,
        template=options.template,
        template_args=options.template_args,
        ignored=[f"--{name.replace('_', '-')}" for name in sorted(ignored)],
    )
