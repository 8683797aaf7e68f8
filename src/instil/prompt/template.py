"""Chat templates: the tokenizer's own, a built-in one or a file, rendered as transformers renders them when serving."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from instil.errors import TemplateError, UsageError, nearest
from instil.prompt.tokenizer import Tokenizer

_SET_BY_RENDERING = (
    "messages",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)
_DECLARATION = re.compile(r"\{#-?\s*(?P<key>description|special_tokens):\s*(?P<value>.*?)\s*-?#\}", re.DOTALL)


_LIKE_A_TOKEN = re.compile(r"<\|\w+\|>")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja chat template, bound to a tokenizer's special tokens and to the arguments it is given.

    Args:
        name: The built-in name, the file, or `tokenizer`.
        text: The Jinja source.
        tool_text: Another source for conversations with tools, where the tokenizer has one.
        special_tokens: What the source may name (`bos_token`, `eos_token`, …).
        arguments: Template arguments (`enable_thinking`, …), as the server will pass them.
    """

    name: str
    text: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tool_text: str | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, answer: bool = False
    ) -> str:
        """The text of messages in wire form.

        Args:
            messages: As `Message.to_wire` gives them.
            tools: The tools on offer.
            answer: Whether to go on to where the assistant answers (transformers' `add_generation_prompt`).

        Raises:
            TemplateError: The template refuses the messages or fails on them.
        """
        aliased = [_with_thinking(message) if "reasoning_content" in message else message for message in messages]
        try:
            compiled, known = _compiled(self.tool_text if tools and self.tool_text else self.text)
            given = {
                **known,
                "messages": aliased,
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": answer,
                **self.special_tokens,
                **self.arguments,
            }
            rendered = "".join(compiled.root_render_func(compiled.new_context(given, shared=True)))
        except Exception as error:
            raise TemplateError(f"the template {self.name!r} refuses this conversation: {error}") from error
        return rendered

    def spells(self, token: str) -> bool:
        """Whether the template's source holds this text."""
        return token in self.text or token in (self.tool_text or "")

    def fingerprint(self) -> str:
        """What decides its renderings, as a hash; the date as well, if the template asks for it."""
        today = datetime.date.today().isoformat() if self.spells("strftime_now") else ""
        parts = [
            self.text,
            self.tool_text or "",
            json.dumps([self.special_tokens, self.arguments], sort_keys=True, default=str),
            today,
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@lru_cache(maxsize=16)
def _compiled(text: str) -> tuple[Any, dict[str, Any]]:
    """The template as transformers compiles it, in its sandbox, and the names it knows whatever it is given.

    What transformers does to render it, less what takes most of the time: it copies the messages, which are plain data
    here already, and jinja2 collects the known names anew for each rendering.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(text)
    return compiled, dict(compiled.globals)


def _with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its reasoning under the name that gpt-oss reads as well, as transformers gives it."""
    return {"thinking": message["reasoning_content"], **message}


@dataclass(frozen=True, slots=True)
class Builtin:
    """A template that ships with Instil: its source, what it says of itself, the special tokens it needs."""

    name: str
    text: str
    description: str
    special_tokens: Mapping[str, str]


def builtin_templates() -> dict[str, Builtin]:
    """The built-in templates by name."""
    folder = resources.files("instil.prompt") / "templates"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".jinja"):
            text = file.read_text(encoding="utf-8")
            name = file.name.removesuffix(".jinja")
            declared = _declarations(text, name)
            found[name] = Builtin(name, text, declared.get("description", ""), declared.get("special_tokens", {}))
    return found


def no_template(tokenizer: Tokenizer) -> ChatTemplate:
    """What stands where only plain text is trained: it refuses every conversation."""
    reason = (
        f"there is no chat template: choose one with --template: {', '.join(builtin_templates())}, or a .jinja file"
    )
    return ChatTemplate("none", "{{ raise_exception('" + reason + "') }}", tokenizer.special_tokens)


def load_template(
    choice: str | Path | None, tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """The template to render with; the special tokens it declares are reserved in the tokenizer.

    Args:
        choice: A built-in name, a `.jinja` file, or None for the tokenizer's own.
        tokenizer: Gets the declared special tokens that it lacks.
        arguments: Template arguments. Of the tokenizer's own template they are added to those that the model beside it
            was tuned with, and come before them.

    Raises:
        UsageError: No built-in template and no file has this name, or an argument is one that rendering itself sets.
        TemplateError: The tokenizer has no template of its own, or the source is no Jinja template.
    """
    for argument in sorted({*(arguments or ())}.intersection(_SET_BY_RENDERING)):
        raise UsageError(f"--template-args {argument}: rendering sets this itself", "Leave it out.")
    known = builtin_templates()
    if choice is None:
        if not tokenizer.chat_template:
            raise TemplateError(
                f"{tokenizer.name}: this tokenizer has no chat template of its own",
                f"Choose one with --template: {', '.join(known)}, or a .jinja file.",
            )
        name, text = "tokenizer", tokenizer.chat_template
    elif str(choice) in known:
        name, text = str(choice), known[str(choice)].text
        if tokenizer.bos_token is not None:
            text = "{{ bos_token }}" + text
    else:
        name, text = str(choice), _read_file(Path(choice), known)
    tokenizer.add_special_tokens(_declarations(text, name).get("special_tokens", {}))
    tool_text = tokenizer.tool_template if choice is None else None
    own = tokenizer.template_arguments if choice is None else {}
    template = ChatTemplate(name, text, tokenizer.special_tokens, {**own, **(arguments or {})}, tool_text)
    _check(template)
    return template


def template_warnings(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What about a template and a tokenizer deserves a look before training."""
    said = []
    bos = tokenizer.bos_token
    try:
        begins = bos is None or template.render([{"role": "user", "content": "a"}], answer=True).startswith(bos)
    except TemplateError:
        begins = True
    if not begins:
        said.append(f"the tokenizer begins texts with {bos}, and the template's prompts do not")
    known = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    for name in dict.fromkeys(_LIKE_A_TOKEN.findall(template.text)):
        if name not in known:
            said.append(f"the template writes {name}, which is no token of this tokenizer: it is encoded in pieces")
    return tuple(said)


def _read_file(path: Path, known: Mapping[str, Builtin]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--template {path}: not UTF-8 text: {error}", "Save the template as UTF-8.") from error
    except OSError as error:
        hint = nearest(path.name, known)
        raise UsageError(
            f"--template {path}: no built-in template and no readable file", f"Of the built-in ones: {hint}"
        ) from error


def _declarations(text: str, name: str) -> dict[str, Any]:
    """What the comments of a template's source declare: `description`, `special_tokens` (a JSON object or list)."""
    declared: dict[str, Any] = {match["key"]: match["value"] for match in _DECLARATION.finditer(text)}
    if "special_tokens" in declared:
        try:
            tokens = json.loads(declared["special_tokens"])
        except json.JSONDecodeError:
            tokens = None
        if not isinstance(tokens, dict | list) or not all(isinstance(token, str) for token in tokens):
            raise TemplateError(
                f"{name}: the comment special_tokens is no JSON object or list of names: {declared['special_tokens']}",
                'Write it as {#- special_tokens: {"<|token|>": "what it means"} -#}.',
            )
        declared["special_tokens"] = tokens if isinstance(tokens, dict) else dict.fromkeys(tokens, "")
    return declared


def _check(template: ChatTemplate) -> None:
    """Refuse a template that cannot work whatever the data, and arguments that it never reads."""
    import jinja2

    try:
        user = {"role": "user", "content": "a"}
        whole = template.render([user, {"role": "assistant", "content": "a"}]) + template.render([user], answer=True)
    except TemplateError as error:
        cause = error.__cause__
        if isinstance(cause, jinja2.TemplateSyntaxError):
            raise TemplateError(
                f"{template.name}:{cause.lineno}: not a Jinja template: {cause.message}", "Mend the template."
            ) from error
        if isinstance(cause, jinja2.exceptions.SecurityError | jinja2.TemplateNotFound):
            raise TemplateError(
                f"{template.name}: does what a chat template may not: {cause}", "Mend the template."
            ) from error
        whole = None  # it may need more than this conversation holds
    if whole is not None and not whole.strip():
        raise TemplateError(f"{template.name}: renders nothing", "Mend the template.")
    read = {name for text in (template.text, template.tool_text or "") for name in _read_names(text)}
    for argument in template.arguments:
        if argument not in read:
            raise UsageError(
                f"--template-args {argument}: the template {template.name!r} reads no such argument",
                nearest(argument, read.difference(_SET_BY_RENDERING, template.special_tokens)) if read else "",
            )


def _read_names(text: str) -> set[str]:
    """The names that a template takes from outside."""
    import jinja2.meta

    compiled, known = _compiled(text)
    return set(jinja2.meta.find_undeclared_variables(compiled.environment.parse(text))) - known.keys()
