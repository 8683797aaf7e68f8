"""Loading templates: what they declare, and what deserves a look before training."""

import pytest

from instil.errors import TemplateError, UsageError
from instil.prompt.template import builtin_templates, load_template, template_warnings


@pytest.mark.parametrize("name", builtin_templates())
@pytest.mark.parametrize("kind", ["cl100k", "byte_level_bos"])
def test_builtin_templates_deserve_no_warning(tokenizer_of, kind, name):
    tokenizer = tokenizer_of(kind)
    arguments = {"order": "psm"} if name == "fim" else {}
    assert template_warnings(load_template(name, tokenizer, arguments), tokenizer) == ()


def test_tokens_that_a_template_writes_and_the_tokenizer_lacks_are_said(tokenizer_of, tmp_path):
    file = tmp_path / "turns.jinja"
    text = "{% for m in messages %}<|turn|>{{ m.content }}<|done|>{% endfor %}"
    file.write_text(text)
    tokenizer = tokenizer_of("cl100k")
    said = template_warnings(load_template(file, tokenizer), tokenizer)
    assert ["<|turn|>" in said[0], "<|done|>" in said[1], len(said)] == [True, True, 2]

    file.write_text('{#- special_tokens: {"<|turn|>": "a turn begins", "<|done|>": "and ends"} -#}' + text)
    assert template_warnings(load_template(file, tokenizer), tokenizer) == ()
    assert tokenizer.added == ("<|turn|>", "<|done|>")
    (piece,) = tokenizer.backend.encode("<|turn|>", add_special_tokens=False).ids
    assert tokenizer.backend.id_to_token(piece) == "<|turn|>"


def test_a_template_without_the_tokenizers_bos_is_said(tokenizer_of, tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = tokenizer_of("byte_level_bos")
    (said,) = template_warnings(load_template(file, tokenizer), tokenizer)
    assert f"begins texts with {tokenizer.bos_token}" in said
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert template_warnings(load_template(file, tokenizer), tokenizer) == ()


def test_what_cannot_be_loaded(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("cl100k")
    with pytest.raises(UsageError, match="did you mean 'chatml'"):
        load_template("chatlm", tokenizer)
    with pytest.raises(TemplateError, match=r"no chat template of its own\n.*--template: alpaca"):
        load_template(None, tokenizer)
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        load_template(tmp_path / "latin.jinja", tokenizer)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(TemplateError, match=r"bad.jinja:1: not a Jinja template"):
        load_template(tmp_path / "bad.jinja", tokenizer)
    (tmp_path / "bad.jinja").write_text("{#- special_tokens: {<|a|>} -#}")
    with pytest.raises(TemplateError, match="no JSON object or list"):
        load_template(tmp_path / "bad.jinja", tokenizer)


def test_a_template_for_tools_is_taken_where_there_is_one(tokenizer_of):
    tokenizer = tokenizer_of("cl100k")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.tool_template = "{{ tools[0].name }}: {% for m in messages %}{{ m.content }}{% endfor %}"
    template = load_template(None, tokenizer)
    message = {"role": "user", "content": "Hi"}
    assert [template.render([message]), template.render([message], [{"name": "f"}])] == ["Hi", "f: Hi"]
    assert template.fingerprint() != load_template("plain", tokenizer).fingerprint()


@pytest.mark.parametrize("text", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_the_sandbox_holds(tokenizer_of, tmp_path, text):
    (tmp_path / "bad.jinja").write_text(text + "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(TemplateError, match="may not"):
        load_template(tmp_path / "bad.jinja", tokenizer_of("cl100k"))


def test_a_template_that_renders_nothing(tokenizer_of, tmp_path):
    (tmp_path / "bad.jinja").write_text("{# nothing #}")
    with pytest.raises(TemplateError, match="renders nothing"):
        load_template(tmp_path / "bad.jinja", tokenizer_of("cl100k"))


def test_arguments_that_a_template_does_not_read(tokenizer_of, tmp_path):
    file = tmp_path / "think.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}")
    tokenizer = tokenizer_of("cl100k")
    load_template(file, tokenizer, {"enable_thinking": False})
    with pytest.raises(UsageError, match=r"enable_thinkin: .*\n.*did you mean 'enable_thinking'"):
        load_template(file, tokenizer, {"enable_thinkin": False})
    with pytest.raises(UsageError, match="reads no such argument"):
        load_template("chatml", tokenizer, {"order": "spm"})
