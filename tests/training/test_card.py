"""The model card: its front matter, its figures, and its code, which is run."""

import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import yaml
from pydantic import BaseModel
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, LlamaConfig

import instil
from instil.packing import prepare
from instil.pocket import save_sample_tokenizer
from instil.prompt import PromptOptions, load_renderer
from instil.training.card import draw_loss, example_of, model_card
from instil.training.events import Evaluation, Outcome, Resolved, Step
from instil.training.output import describe_data, describe_run, save_tokenizer, write_output

ROWS = [{"instruction": "Say |hello|.", "output": "Hello."}, {"instruction": "Add.", "input": "1, 2", "output": "3"}]
GAPS = [{"prefix": "def f():", "middle": "\n    return 1", "suffix": "\n"}]
STEPS = [Step(n, 3.0 / n, 1e-4, 0.5, 100, 40, 1234.5, 0.25 * n) for n in (1, 2, 3)]
OUTCOME = Outcome(3, STEPS, [Evaluation(0, 2.5, True, 0.0), Evaluation(3, 1.5, True, 1.0)], seconds=1.5)
RESOLVED = Resolved(3, 1.5, 2048, {"learning_rate": 0.00025, "stop": ["a|b"], "warmup_steps": None})
THINKING = (
    '{#- special_tokens: ["<|im_start|>", "<|im_end|>"] -#}'
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and not enable_thinking | default(true) %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if not enable_thinking | default(true) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


class Options(BaseModel):
    """Stands for a run's configuration."""

    model: str | None = None
    init: str | None = None
    learning_rate: float = 1e-4
    template_args: dict = {}
    eval_data: list[str] = []


@pytest.fixture
def base(tmp_path):
    """A whole base model: weights, configuration and tokenizer."""
    folder = save_sample_tokenizer(tmp_path / "base")
    size = Backend.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = LlamaConfig(
        vocab_size=size + 8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write(folder, base, save, *, rows=ROWS, **options):
    records = instil.read(rows)
    chosen = PromptOptions(**options)
    renderer = load_renderer(base, chosen)
    config = Options(model=str(base), template_args=chosen.template_args)
    made_of = describe_run(config, renderer, prepare(records, base, chosen), describe_data(records))
    record = {**made_of, "resolved": RESOLVED.to_json()}
    return write_output(folder, record, save=save, renderer=renderer, outcome=OUTCOME)["notes"]


def save_model(base):
    return AutoModelForCausalLM.from_pretrained(base).save_pretrained


def save_adapter(base):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained


def code_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("made", [save_model, save_adapter])
@pytest.mark.parametrize("template", ["chatml", "fim", "thinking"])
def test_the_code_of_the_card_runs(tmp_path, monkeypatch, capsys, base, made, template):
    options, rows = {"template": template}, GAPS if template == "fim" else ROWS
    if template == "thinking":
        (tmp_path / "thinking.jinja").write_text(THINKING)
        options = {"template": str(tmp_path / "thinking.jinja"), "template_args": {"enable_thinking": False}}
    write(tmp_path / "tuned", base, made(base), rows=rows, **options)
    code = code_of(tmp_path / "tuned").replace("max_new_tokens=256", "max_new_tokens=3")
    assert ("enable_thinking=False" in code) == (template == "thinking")
    assert ("AutoPeftModelForCausalLM" in code) == (made is save_adapter)
    monkeypatch.chdir(tmp_path)
    told = {}
    exec(code, told)
    assert capsys.readouterr().out
    prompt = told["tokenizer"].decode(told["inputs"]["input_ids"][0])
    assert prompt == example_of(load_renderer(base, PromptOptions(**options))).prompt
    stop = "<|endoftext|>" if template == "fim" else "<|im_end|>"
    assert told["model"].generation_config.eos_token_id == told["tokenizer"].convert_tokens_to_ids([stop])


def test_the_example_is_what_the_template_makes(tmp_path, base):
    write(tmp_path / "tuned", base, save_model(base), template="alpaca")
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "### Instruction:\nName the capital of Peru.\n\n### Response:\n```\n" in card
    assert "```text\nLima.<|endoftext|>\n```\n" in card
    assert "An answer ends with `<|endoftext|>`." in card


def test_ticks_in_a_prompt_do_not_end_its_block(tmp_path, base):
    (tmp_path / "ticks.jinja").write_text("{% for m in messages %}```\n{{ m.content }}\n{% endfor %}")
    example = example_of(load_renderer(base, PromptOptions(template=str(tmp_path / "ticks.jinja"))))
    card = model_card(provenance(), "tuned", example, curve=False)
    assert "````text\n```\nName the capital of Peru.\n````\n" in card
    assert "loss.svg" not in card


def provenance(**changes):
    return {
        "base_model": "owner/name",
        "kind": "model",
        "config": Options(model="owner/name").model_dump(),
        "resolved": {"steps": 3, **RESOLVED.settings},
        "data": {"files": [{"path": "/far/a|b.jsonl", "sha256": "0" * 64, "records": 1234}]},
        "eval_data": {"files": [{"path": "hf://owner/data", "sha256": None, "records": 5}]},
        "summary": {
            "rows": {"read": 1240, "kept": 1234},
            "shapes": {"alpaca": 1234},
            "exchanges": 2000,
            "tokens": {"total": 1000, "trained": 250, "share": 0.25},
        },
        "template": {"name": "chatml", "fingerprint": "0", "arguments": {}},
        "stop_tokens": {"<|im_end|>": 5},
        "added_tokens": {},
        "outcome": {
            "steps": 3,
            "seconds": 61.4,
            "tokens": 300,
            "trained_tokens": 120,
            "first_loss": 3.0,
            "final_loss": None,
            "first_eval_loss": 2.5,
            "final_eval_loss": 1.75,
            "best_eval_loss": 1.5,
            "best_step": 2,
            "stopped_early": True,
        },
        "notes": [],
        "versions": {"instil": "1.2", "torch": "3"},
        **changes,
    }


def test_the_figures_of_the_card():
    card = model_card(provenance(), "tuned", None, curve=True)
    for line in (
        "| Training loss, first step | 3.0000 |",
        "| Held-out loss, best | 1.5000 |",
        "| Steps | 3, ended early |",
        "| Weights of step | 2 |",
        "| Rows kept | 1,234 |",
        "| Tokens trained | 250 (25.0%) |",
        "| a\\|b.jsonl | Training | 1,234 | `0000000000000000` |",
        "| data | Held out | 5 |  |",
        "| `learning_rate` | 0.00025 |",
        '| `stop` | ["a\\|b"] |',
        "Versions: instil 1.2, torch 3.",
        "![Loss over the steps](loss.svg)",
    ):
        assert f"\n{line}\n" in card
    assert "last step" not in card, "a loss that was no number has no row"
    assert "warmup_steps" not in card
    assert "/far" not in card, "where a file stood is no one's business"


@pytest.mark.parametrize(
    ("changes", "front"),
    [
        ({}, {"base_model": "owner/name", "base_model_relation": "finetune", "library_name": "transformers"}),
        (
            {"kind": "adapter"},
            {"base_model": "owner/name", "base_model_relation": "adapter", "library_name": "peft"},
        ),
        ({"base_model": "/a/folder"}, {"library_name": "transformers"}),
        ({"base_model": sys.prefix}, {"library_name": "transformers"}),
    ],
)
def test_the_front_matter(changes, front):
    card = model_card(provenance(**changes), "tuned", None, curve=False)
    _, matter, _ = card.split("---\n", 2)
    found = yaml.safe_load(matter)
    tags = found.pop("tags")
    assert found == {**front, "pipeline_tag": "text-generation"}
    assert ["instil" in tags, "lora" in tags] == [True, changes.get("kind") == "adapter"]
    assert card.startswith("---\n")


def test_settings_of_no_adapter_are_left_out():
    config = {"adapter": "none", "lora_rank": 16, "data": ["/far/a"]}
    assert "lora_rank" not in model_card(provenance(config=config), "tuned", None, curve=False)
    card = model_card(provenance(config={**config, "adapter": "lora"}), "tuned", None, curve=False)
    assert "| `lora_rank` | 16 |" in card


def test_a_new_model_is_called_one():
    card = model_card(provenance(config={"init": "configs/tiny"}), "tuned", None, curve=False)
    assert "trained from random weights" in card
    assert "tuned from `folder`" in model_card(provenance(base_model="/a/folder"), "tuned", None, curve=False)


def test_what_was_said_of_the_tokenizer_stands_in_the_card():
    note = "AutoTokenizer loads this tokenizer as X, which encodes otherwise than was trained"
    card = model_card(provenance(notes=[note]), "tuned", None, curve=False)
    assert f"Note: {note}." in card
    assert 'tokenizer = PreTrainedTokenizerFast.from_pretrained("tuned")' in card


def test_the_curve_is_drawn(tmp_path):
    assert draw_loss(tmp_path / "loss.svg", STEPS, OUTCOME.evaluations)
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    texts = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= {"step", "loss (nats a token)", "training", "held out"}
    assert draw_loss(tmp_path / "again.svg", STEPS, OUTCOME.evaluations)
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "loss.svg").read_bytes()
    assert draw_loss(tmp_path / "none.svg", [], [])
    broken = [replace(STEPS[0], loss=float("nan")), *STEPS[1:]]
    assert draw_loss(tmp_path / "nan.svg", broken, [])


def test_the_metric_is_drawn_below_the_loss(tmp_path):
    rising = [replace(each, metric="chrf", value=20.0 * at) for at, each in enumerate(OUTCOME.evaluations)]
    assert draw_loss(tmp_path / "loss.svg", STEPS, rising)
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    texts = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= {"step", "loss (nats a token)", "chrf", "held-out"}
    marks = [node for node in root.iter("{http://www.w3.org/2000/svg}use") if "#c0392b" in node.get("style", "")]
    heights = [float(node.get("y")) for node in marks]
    assert heights[0] < heights[1] < heights[-1] < heights[-2]  # the loss falls, below it the metric rises


def test_without_matplotlib_there_is_no_curve(tmp_path, monkeypatch, base):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (said,) = write(tmp_path / "tuned", base, save_model(base), template="chatml")
    assert "matplotlib is not installed (pip install matplotlib)" in said
    assert not (tmp_path / "tuned" / "loss.svg").exists()
    assert "loss.svg" not in (tmp_path / "tuned" / "README.md").read_text()


def test_tokens_that_were_added_are_named(tmp_path, base):
    renderer = load_renderer(base, PromptOptions(template="chatml"))
    (tmp_path / "tuned").mkdir()
    assert save_tokenizer(tmp_path / "tuned", renderer.tokenizer, renderer.template) == []
    card = model_card(provenance(added_tokens={"<|im_start|>": 7}), "tuned", None, curve=False)
    assert "New tokens: `<|im_start|>`." in card
