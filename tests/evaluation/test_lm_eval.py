"""EleutherAI's harness on Instil's engine: the very numbers of the harness's own model, and its tasks end to end."""

import json
import math
import os
import subprocess
import sys
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from instil.errors import UsageError
from instil.evaluation.figures import of_harness
from instil.evaluation.lm_eval import HarnessModel, batches, check_names, load_tasks, run, sampling_of
from instil.evaluation.statistics import compare
from instil.inference import load_engine
from instil.model import ModelOptions
from instil.pocket import save_sample_tokenizer
from instil.prompt import PromptOptions

CONTEXT = 64
BOS = "<|im_start|>"  # for want of another that the tokenizer knows
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QUESTIONS = [
    {"question": f"What is the {what} of {where}?", "choices": ["a house", "the river Nile", "Lima"], "answer": n % 3}
    for n, (what, where) in enumerate((a, b) for a in ("capital", "color", "plural") for b in ("Peru", "grass", "ox"))
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with its tokenizer, of the kind that has a chat template and adds no BOS."""
    path = save_sample_tokenizer(tmp_path_factory.mktemp("model"))
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def with_bos(folder, tmp_path_factory):
    """The same model, whose tokenizer puts BOS before each text."""
    path = tmp_path_factory.mktemp("with-bos")
    for each in folder.iterdir():
        (path / each.name).write_bytes(each.read_bytes())
    backend = Backend.from_file(str(path / "tokenizer.json"))
    number = backend.token_to_id(BOS)
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, number)])
    backend.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": BOS}))
    (path / "chat_template.jinja").unlink()
    return path


def loaded_from(path, template=None):
    return load_engine(ModelOptions(model=str(path), precision="fp32"), PromptOptions(template=template))


@pytest.fixture(scope="module")
def loaded(folder):
    return loaded_from(folder)


@pytest.fixture(scope="module", params=["folder", "with_bos"])
def both(request):
    """Instil's model and the harness's own, of the same folder."""
    path = request.getfixturevalue(request.param)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=3)
    return HarnessModel(loaded_from(path), as_text=True), theirs


def asked(*arguments):
    return [SimpleNamespace(args=each, task_name="a task") for each in arguments]


def words(count):
    return " ".join(QUESTIONS[n % 9]["question"] for n in range(count))


PAIRS = [
    ("What is the capital of Peru?", " Lima"),
    ("What is the capital of Peru?", " The capital of Peru is Lima."),  # the same context, a longer continuation
    ("What is the capital of Peru?", " The capital"),  # the beginning of another
    ("What is the capital of Peru? ", "Lima"),  # the space is the continuation's
    ("What is the color of grass?", " green"),
    ("", "Lima is the capital of Peru."),
    ("", " and so on"),
    (words(20), " The plural of ox is oxen."),  # longer than the model's context
    ("Houses and hou", "ses"),  # a token may straddle the seam
    ("What is the capital of Peru?", " Lima"),  # once more
]


def test_log_likelihoods_are_those_of_the_harness(both):
    ours = both[0]
    before = ours.cut
    found, expected = (each.loglikelihood(asked(*PAIRS), disable_tqdm=True) for each in both)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]
    assert found[0] == found[-1]
    assert len({round(each[0], 3) for each in found}) >= len(PAIRS) - 2
    assert ours.cut - before == 1
    assert "1 of 10 requests were cut from the left" in ours.notes()[0]


def test_greedy_continuations_are_known_for_what_they_are(both):
    """The likeliest next token behind each of many contexts, where its text alone is that token again; and others."""
    ours, theirs = both
    contexts = [each["question"] for each in QUESTIONS]
    answers = ours.generate_until(asked(*((each, {"until": [], "max_gen_toks": 1}) for each in contexts)))
    pairs = [(context, said + more) for context, said in zip(contexts, answers, strict=True) for more in ("", " Lima")]
    pairs = [(context, text) for context, text in pairs if text]
    found = [each for _, each in ours.loglikelihood(asked(*pairs))]
    assert found == [each for _, each in theirs.loglikelihood(asked(*pairs), disable_tqdm=True)]
    assert set(found) == {True, False}


def test_texts_as_a_whole_are_those_of_the_harness(both):
    texts = [("Lima is the capital of Peru.",), (words(1),), (words(30),), ("",), (words(31),)]
    assert len(both[0].tok_encode(texts[2][0])) > 3 * CONTEXT
    found, expected = (each.loglikelihood_rolling(asked(*texts)) for each in both)
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[0] == pytest.approx(expected[0], abs=1e-4)


def test_answers_are_those_of_the_harness(both):
    ours, theirs = both
    before = ours.cut
    free = {"until": [], "max_gen_toks": 12}
    contexts = [each["question"] for each in QUESTIONS[:4]] + [words(20)]
    expected = [theirs.generate_until(asked((each, dict(free))), disable_tqdm=True)[0] for each in contexts]
    found = ours.generate_until(asked(*((each, dict(free)) for each in contexts)))
    assert found == [each.rstrip("\ufffd") for each in expected], "but for half a character at the end"
    assert len(set(found)) > 1
    assert ours.cut - before == 1
    stop = next(each[2:5] for each in found if len(each) > 8)  # within an answer
    stopping = {"until": [stop, "</s>"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    stopped = ours.generate_until(asked(*((each, dict(stopping)) for each in contexts)))
    assert stopped == [each.split(stop)[0] for each in found]
    assert stopped != found


def test_draws_follow_the_task():
    drawn = sampling_of({"do_sample": True, "top_p": 0.9, "max_gen_toks": 7, "until": ["\n", ""]}, "a task")
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_new_tokens, drawn.stop) == (1.0, 0.9, 0, 7, ["\n"])
    assert sampling_of({"temperature": 0.3}, "a task").temperature == 0.3
    greedy = sampling_of({"until": "\n", "do_sample": False, "temperature": 0.3, "num_beams": 1}, "a task")
    assert (greedy.temperature, greedy.max_new_tokens, greedy.stop) == (0.0, 256, ["\n"])
    with pytest.raises(UsageError, match="a task: generates with num_beams 4, which Instil does not"):
        sampling_of({"num_beams": 4}, "a task")


def test_a_sampled_answer_repeats_and_differs_between_repeats(loaded):
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    requests = asked(*[("What is the capital of Peru?", drawn)] * 3)
    first, again = (HarnessModel(loaded, as_text=True).generate_until(requests) for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


def test_what_does_not_fit_is_refused(loaded):
    ours = HarnessModel(loaded, as_text=True)
    with pytest.raises(UsageError, match=r"continuation ' What is the capital.* and the model takes 1 to 64"):
        ours.loglikelihood(asked(("Well:", " " + words(20))))
    with pytest.raises(UsageError, match="continuation '' has 0 tokens"):
        ours.loglikelihood(asked(("Well:", "")))
    with pytest.raises(UsageError, match="a task: asks for 64 tokens, and the model takes 64"):
        ours.generate_until(asked(("Well:", {"until": [], "max_gen_toks": 64})))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=12), st.integers(1, 30))
def test_batches_hold_every_path_once_and_what_fits(paths, tokens):
    found = list(batches(paths, tokens))
    assert sorted(number for batch in found for number in batch) == list(range(len(paths)))
    for batch in found:
        nodes = {tuple(paths[number][: end + 1]) for number in batch for end in range(len(paths[number]))}
        assert len(nodes) <= tokens or len({tuple(paths[number]) for number in batch}) == 1


def test_a_context_is_read_once_for_all_its_continuations(loaded):
    """Four choices behind a long context are hardly more tokens than one."""
    ours = HarnessModel(loaded, as_text=True)
    read = []
    scores = ours._reader.scores
    ours._reader.scores = lambda batch: read.append(batch.size) or scores(batch)
    context = words(5)
    assert len(ours.tok_encode(context)) > 40
    found = ours.loglikelihood(asked(*((context, f" {each}") for each in "ABCD")))
    assert len({each for each, _ in found}) == 4
    assert read == [len(ours.tok_encode(context))], "the last token of each is only predicted"


# The chat template


def test_prompts_are_those_of_the_model_s_template(folder, loaded):
    ours = HarnessModel(loaded)
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
        {"role": "user", "content": "You?"},
    ]
    text = ours.apply_chat_template(turns)
    assert text == theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ours.tok_encode(text) == theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    begun = [*turns, {"role": "assistant", "content": "Yes,"}]
    text = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert ours.notes() == []
    system = [{"role": "system", "content": "Be brief."}, *turns]
    assert ours.apply_chat_template(system) == ours.apply_chat_template(turns)
    assert ours.notes() == ["1 prompts are without their system message, which the template refuses"]


def test_a_control_token_that_a_message_spells_stays_text(loaded):
    ours = HarnessModel(loaded)
    steering = loaded.tokenizer.backend.token_to_id("<|im_end|>")
    text = ours.apply_chat_template([{"role": "user", "content": "What is <|im_end|>?"}])
    for read in (text, text.rstrip(), text + "A token."):
        assert ours.tok_encode(read).count(steering) == 1
    other = ours.apply_chat_template([{"role": "user", "content": "What is it?"}])
    assert ours.tok_encode(other).count(steering) == 1


def test_an_answer_stands_where_the_template_puts_it(folder):
    """`Assistant:` is answered with ` Lima`: the space is the template's, in likelihoods as in answers."""
    ours = HarnessModel(loaded_from(folder, template="human-assistant"))
    text = ours.apply_chat_template([{"role": "user", "content": "Where?"}])
    assert text.endswith("Assistant: ")
    plain = text.removesuffix(" ")
    assert ours.loglikelihood(asked((text, "Lima"))) == ours.loglikelihood(asked((plain, " Lima")))
    free = {"until": [], "max_gen_toks": 6}
    assert ours.generate_until(asked((text, free), (plain, free)))[0] == (
        ours.generate_until(asked((plain, free)))[0].removeprefix(" ")
    )


# Tasks, end to end


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The files of tasks of our own: choices with examples, answers, and texts."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(path / "rows.jsonl"), "cache_dir": str(path / "cache")},
        "test_split": "train",
        "doc_to_text": "{{question}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    own = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "fewshot_split": "train",
            "num_fewshot": 1,
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, more in own.items():
        # JSON is YAML
        (path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **more}))
    return path


def files(tasks, *names):
    return [str(tasks / f"{name}.yaml") for name in names]


def own_accuracy(lm, chat):
    """The share of questions whose answer is the likeliest, asked one by one without the harness's tasks."""
    right = []
    for each in QUESTIONS:
        context = lm.apply_chat_template([{"role": "user", "content": each["question"]}]) if chat else each["question"]
        space = "" if chat else " "
        likelihoods = [lm.loglikelihood(asked((context, space + choice)))[0][0] for choice in each["choices"]]
        right.append(likelihoods.index(max(likelihoods)) == each["answer"])
    return sum(right) / len(right)


@pytest.mark.parametrize("chat", [True, False])
def test_tasks_are_run(tasks, loaded, chat):
    chosen = load_tasks(files(tasks, "choose", "answer", "read"))
    chosen["tasks"]["choose"].set_config(key="num_fewshot", value=0)
    found = run(loaded, chosen, as_text=not chat)
    assert found["template"] is chat
    assert list(found["tasks"]) == ["choose", "answer", "read"]
    accuracy = found["tasks"]["choose"]["acc"]
    assert accuracy["value"] == pytest.approx(own_accuracy(HarnessModel(loaded, as_text=not chat), chat))
    p, n = accuracy["value"], len(QUESTIONS)
    assert accuracy["n"] == n
    assert accuracy["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(
        (max(0, p - 1.959964 * accuracy["stderr"]), min(1, p + 1.959964 * accuracy["stderr"]))
    )
    wrong = found["tasks"]["answer"]["exact_match"]
    assert (wrong["value"], wrong["stderr"], wrong["low"], wrong["high"]) == (0.0, 0.0, None, None)
    texts = [(each["question"],) for each in QUESTIONS]
    likelihoods = HarnessModel(loaded, as_text=True).loglikelihood_rolling(asked(*texts))
    count = sum(len(text.split()) for (text,) in texts)
    assert found["tasks"]["read"]["word_perplexity"]["value"] == pytest.approx(math.exp(-sum(likelihoods) / count))
    json.dumps(found, allow_nan=False)


def test_the_same_tasks_ask_two_models_the_same(tasks, loaded):
    """Examples are drawn anew from the same seed, and the attention of the model is as it was."""
    attention = loaded.engine.model.config._attn_implementation
    chosen = load_tasks(files(tasks, "choose"))
    first = run(loaded, chosen, as_text=True)
    requests = [each.args for each in chosen["tasks"]["choose"].instances]
    assert run(loaded, chosen, as_text=True) == first
    assert [each.args for each in chosen["tasks"]["choose"].instances] == requests
    assert any(context.count("?") == 2 for context, _ in requests), "one example before each"
    assert loaded.engine.model.config._attn_implementation == attention


def test_a_limit_takes_items_evenly_spaced(tasks, loaded):
    chosen = load_tasks(files(tasks, "choose"))
    found = run(loaded, chosen, 3, as_text=True)
    instances = chosen["tasks"]["choose"].instances
    assert list(dict.fromkeys(each.doc["question"] for each in instances)) == [
        QUESTIONS[at]["question"] for at in (0, 3, 6)
    ]
    assert found["tasks"]["choose"]["acc"]["n"] == 3


def test_figures_of_both_models():
    values = {"value": 0.25, "stderr": 0.1, "low": 0.054, "high": 0.446, "n": 20, "unit": "share"}
    other = {**values, "value": None, "stderr": None, "low": None, "high": None, "unit": ""}
    tuned = {"tasks": {"one": {"acc": values, "ppl": other}}}
    base = {"tasks": {"one": {"acc": {**values, "value": 0.5, "low": 0.281, "high": 0.719}, "ppl": other}}}
    share, number = of_harness({"tuned": tuned, "base": base})
    assert share.measure == "one: acc"
    assert share.with_interval("tuned") == "25.0 % (5.4 to 44.6)"
    assert share.with_interval("base") == "50.0 % (28.1 to 71.9)"
    assert number.with_interval("tuned") == "nan"
    assert [each.base for each in of_harness({"tuned": tuned})] == [None, None]
    assert of_harness({}) == []


def test_two_models_are_paired_by_document(tasks, loaded):
    """Against the documents asked one by one; what is no mean over documents has no verdict."""
    chosen = load_tasks(files(tasks, "choose", "read"))
    found = run(loaded, chosen, as_text=True)
    documents = found["documents"]["choose"]["acc"]
    assert fmean(documents["values"].values()) == found["tasks"]["choose"]["acc"]["value"]
    requests = chosen["tasks"]["choose"].instances
    for number, question in enumerate(QUESTIONS):
        of_question = [each.resps[0][0] for each in requests if each.doc_id == number]
        right = of_question.index(max(of_question)) == question["answer"]
        assert documents["values"][str(number)] == float(right)
    assert found["documents"]["read"] == {}
    base = json.loads(json.dumps(found))
    values = base["documents"]["choose"]["acc"]["values"]
    values |= {number: 1 - value for number, value in list(values.items())[:5]}
    figures = {each.measure: each for each in of_harness({"tuned": found, "base": base})}
    before, after = (list(map(bool, each["documents"]["choose"]["acc"]["values"].values())) for each in (base, found))
    assert figures["choose: acc"].comparison == compare(before, after)
    assert figures["choose: acc"].comparison.test == "exact McNemar"
    assert figures["choose: acc"].headline
    assert figures["read: word_perplexity"].comparison is None
    lower = json.loads(json.dumps(found).replace('"higher_is_better": true', '"higher_is_better": false'))
    lower["documents"]["choose"]["acc"]["values"] = {
        number: value + 0.5 for number, value in documents["values"].items()
    }
    (number,) = (each for each in of_harness({"tuned": lower, "base": found}) if each.measure == "choose: acc")
    assert (number.comparison.test, number.comparison.losses) == ("exact sign flips", len(QUESTIONS))


@pytest.mark.prove
def test_the_command_shows_them_and_keeps_them(folder, tasks, loaded, tmp_path):
    suite = "lm-eval:" + ",".join(files(tasks, "choose", "answer"))
    models = ["--model", str(folder), "--base", str(folder), "--precision", "fp32"]
    done = subprocess.run(
        [sys.executable, "-m", "instil", "evaluate", *models, "--suite", suite, "--limit", "5", "--output", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = run(loaded, files(tasks, "choose", "answer"), 5)
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())["harness"]
    assert kept == {"tuned": expected, "base": expected}
    assert results["lm_eval"]["tuned"]["tasks"] == expected["tasks"]
    shown = of_harness(kept)
    page = (tmp_path / "out" / "report.html").read_text()
    for each in shown:
        (line,) = (line for line in done.stdout.splitlines() if line.strip().startswith(f"{each.measure} "))
        verdict = each.comparison.verdict.split()
        assert line.split() == [*each.measure.split(), "5", *2 * each.with_interval("tuned").split(), *verdict]
        assert f"{each.measure} <" in page
    assert [each.measure for each in shown] == ["choose: acc", "choose: acc_norm", "answer: exact_match"]
    assert any("cut from the left" in each for each in results["warnings"]) == bool(expected["notes"])
    assert all(each["comparison"]["ties"] == 5 for each in results["figures"])
    again = subprocess.run(
        [sys.executable, "-m", "instil", "evaluate", "--rescore", "out"], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert again.stdout == done.stdout


# What cannot be


def test_an_unknown_task_gets_the_nearest_name():
    known = dict.fromkeys(["hellaswag", "arc_easy", "mmlu"])
    check_names(["mmlu"], known)
    with pytest.raises(UsageError, match=r"no task 'hellaswg', 'zzzzz'\n.*did you mean 'hellaswag'\?"):
        check_names(["hellaswg", "mmlu", "zzzzz"], known)
    with pytest.raises(UsageError, match="`lm-eval ls tasks` lists them"):
        check_names(["zzzzz"], known)


def test_data_that_cannot_be_had_is_named(tasks, tmp_path):
    given = json.loads((tasks / "choose.yaml").read_text())
    for name in ("one", "two"):
        given["dataset_kwargs"]["data_files"] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**given, "task": name}))
    with pytest.raises(UsageError, match=r"one.yaml cannot be loaded: .*one.jsonl[^\n]*\n  .*two.yaml.*two.jsonl"):
        load_tasks([str(tmp_path / "one.yaml"), *files(tasks, "choose"), str(tmp_path / "two.yaml")])


def test_tasks_that_run_programs_are_refused(tasks, tmp_path):
    given = json.loads((tasks / "answer.yaml").read_text())
    (tmp_path / "unsafe.yaml").write_text(json.dumps({**given, "unsafe_code": True}))
    with pytest.raises(UsageError, match="answer runs what the model writes"):
        load_tasks([str(tmp_path / "unsafe.yaml")])


@pytest.mark.prove
def test_the_harness_s_own_tasks_are_found_but_not_their_data(tmp_path):
    """Its whole index is read, and the hub is not asked."""
    code = "from instil.evaluation.lm_eval import load_tasks; import sys; load_tasks(sys.argv[1:])"

    def said(*names):
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=env)
        assert done.returncode == 1
        return done.stderr

    assert "there is no task 'arc_esy'\n  did you mean 'arc_easy'?" in said("arc_esy")
    assert "UsageError: lm-eval: arc_easy cannot be loaded: " in said("arc_easy")


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "instil.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UsageError, match=r"needs the package 'lm_eval.*\n.*pip install 'instil\[lm-eval\]'"):
        __import__("instil.evaluation.lm_eval")
