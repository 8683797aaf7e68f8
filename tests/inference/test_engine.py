"""Answers side by side are those of transformers one by one: any kind, any batch, any order of coming and going."""

import random

import pytest
import torch

from instil.errors import UsageError
from instil.inference import Engine, Sampling, SamplingOptions
from instil.inference.cache import NAME
from instil.inference.reading import Kept, SlotReader, forest
from instil.model.forward import TreeModel

from ..model.forests import KINDS, VOCABULARY, random_model

ONE_BY_ONE = {"bloom"}


def some_prompts(count=9, seed=0, longest=14):
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    prompts[3], prompts[4] = prompts[0], [*prompts[0], 5]
    return prompts


def by_transformers(model, prompt, count, stops=()):
    """`generate` on one prompt, without padding."""
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
    )
    ids = made[0, len(prompt) :].tolist()
    return tuple(ids[:-1] if ids[-1] in stops else ids)


def check_greedy(model, prompt, answer):
    """Each token is the likeliest when all before it is read anew."""
    for at, token in enumerate(answer):
        read = torch.tensor([[*prompt, *answer[:at]]])
        assert int(model(read, use_cache=False).logits[0, -1].argmax()) == token


@pytest.fixture(scope="module")
def llama():
    return random_model("llama", torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_transformers(kind, letters):
    model = random_model(kind, torch.float32)
    engine = Engine(model, letters, [7, 9])
    assert bool(engine.one_by_one) == (kind in ONE_BY_ONE)
    prompts = some_prompts()
    answers = engine.generate(prompts, SamplingOptions(max_new_tokens=8, batch_size=4))
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        if kind == "phi3-longrope":  # whose cache transformers keeps where positions are rotated otherwise
            check_greedy(model, prompt, answer.ids)
        else:
            assert answer.ids == by_transformers(model, prompt, 8, [7, 9])
        assert answer.ended == ("stop" if len(answer.ids) < 8 else "length")
        assert answer.text == letters.decode(answer.ids)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_that_cannot_are_read_one_by_one(kind, letters):
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {"state_size": 4} if kind == "mamba" else {"n_head": 2, "n_layer": 2}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, **own)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.3 * torch.randn_like(each))
    engine = Engine(model, letters, [])
    assert engine.one_by_one
    prompts = some_prompts(5)
    for prompt, (answer,) in zip(prompts, engine.generate(prompts, SamplingOptions(max_new_tokens=6)), strict=True):
        check_greedy(model, prompt, answer.ids)


def test_logits_are_those_of_each_answer_by_itself(llama):
    """In rows that come and go, with a prefix that is read once."""
    model = random_model("mistral")
    prompts = some_prompts(6)
    prompts[1] = [*prompts[0][:3], 5, 6]

    def whole(ids):
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    with torch.inference_mode():
        model.set_attn_implementation(NAME)
        reader = SlotReader(TreeModel(model, one_by_one="it generates"), 4, shared=2)
        rows, found = [list(each) for each in prompts[:3]], []
        found += zip(map(list, rows), reader.join(rows).logits, strict=True)
        for step in range(20):
            if step in (3, 9):
                reader.drop(0)
                rows[0] = rows[-1]
                rows.pop()
            if step in (5, 12):
                new = [prompts[3], prompts[4]][: 4 - len(rows)]
                rows += map(list, new)
                found += zip(map(list, new), reader.join(new).logits, strict=True)
            tokens = [(7 * step + 3 * row) % VOCABULARY for row in range(len(rows))]
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            found += zip(map(list, rows), reader.step(tokens), strict=True)
        model.set_attn_implementation("eager")
        for ids, logits in found:
            torch.testing.assert_close(logits, whole(ids), atol=1e-5, rtol=1e-5)


def test_a_forest_holds_what_is_shared_once():
    tree, paths = forest([[1, 2, 3, 4], [1, 2, 9], [5], [1, 2, 9], [1, 2]], shared=2)
    assert tree.input_ids.tolist() == [1, 2, 3, 4, 9, 5]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 2, 0]
    assert tree.subtree_end.tolist() == [5, 5, 4, 4, 5, 6]
    assert [path.tolist() for path in paths] == [[0, 1, 2, 3], [0, 1, 4], [5], [0, 1, 4], [0, 1]]
    assert forest([[1, 2, 3], [1, 2, 4]], shared=3)[0].size == 6


@pytest.mark.parametrize("narrowed", [{}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.4}])
def test_draws_do_not_depend_on_the_batch(llama, letters, narrowed):
    engine = Engine(llama, letters, [7])
    prompts = some_prompts()
    options = {"temperature": 1.3, "seed": 5, "answers": 2, "max_new_tokens": 10, **narrowed}
    many = engine.generate(prompts, SamplingOptions(**options))
    assert many == engine.generate(prompts, SamplingOptions(**options))
    few = engine.generate(prompts, SamplingOptions(**options, batch_size=3))
    assert [[a.ids for a in own] for own in many] == [[a.ids for a in own] for own in few]
    other = engine.generate(prompts, SamplingOptions(**{**options, "seed": 6}))
    assert [own[0].ids for own in many] != [own[0].ids for own in other]
    assert any(own[0].ids != own[1].ids for own in many), "answers to a prompt are drawn apart"
    assert many[0][0].ids != many[3][0].ids, "so are those to equal prompts"


def test_sampled_answers_have_the_models_distribution(llama, letters):
    (own,) = Engine(llama, letters, []).generate(
        [[3, 4, 5]], SamplingOptions(temperature=1, answers=3000, max_new_tokens=1)
    )
    found = torch.bincount(torch.tensor([each.ids[0] for each in own]), minlength=VOCABULARY) / 3000
    expected = torch.softmax(llama(torch.tensor([[3, 4, 5]])).logits[0, -1], -1).detach()
    assert float((found - expected).abs().max()) < 4 * (0.25 / 3000) ** 0.5


def test_repetition_is_penalized_as_in_transformers(llama, letters):
    """In rows whose neighbours leave."""
    prompts = some_prompts()
    limits = [4 + 3 * (number % 3) for number in range(len(prompts))]
    options = SamplingOptions(repetition_penalty=1.8, batch_size=4)
    answers = Engine(llama, letters, []).generate(prompts, options, max_new_tokens=limits)
    for prompt, limit, (answer,) in zip(prompts, limits, answers, strict=True):
        made = llama.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=limit,
            repetition_penalty=1.8,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )
        assert answer.ids == tuple(made[0, len(prompt) :].tolist())


def test_what_is_told_is_the_answers(llama, letters):
    told, done = {}, []
    prompts = some_prompts()
    free = Engine(llama, letters, []).generate(prompts, SamplingOptions(max_new_tokens=9))
    stop = free[2][0].text[3:5]
    options = SamplingOptions(max_new_tokens=9, stop=[stop], batch_size=3, answers=2)
    answers = Engine(llama, letters, []).generate(
        prompts,
        options,
        on_text=lambda prompt, answer, piece: told.setdefault((prompt, answer), []).append(piece),
        on_done=done.append,
    )
    assert sorted(done) == list(range(len(prompts)))
    for number, own in enumerate(answers):
        for answer, each in enumerate(own):
            assert "".join(told.get((number, answer), [])) == each.text
            assert stop not in each.text
    assert (answers[2][0].ended, answers[2][0].text) == ("stop-string", free[2][0].text[: free[2][0].text.find(stop)])


def test_answers_end_at_their_own_length_or_the_models(llama, letters):
    engine = Engine(llama, letters, [])
    prompts = [[1] * 60, [2] * 5, [3] * 63]
    answers = [own[0] for own in engine.generate(prompts, max_new_tokens=[30, 7, 1])]
    assert [(len(each.ids), each.ended) for each in answers] == [(4, "context"), (7, "length"), (1, "length")]


@pytest.mark.parametrize(("prompt", "said"), [([], "has no tokens"), ([1] * 64, "the model takes 64")])
def test_a_prompt_that_cannot_be_is_refused(llama, letters, prompt, said):
    with pytest.raises(UsageError, match=f"prompt 1: .*{said}"):
        Engine(llama, letters, []).generate([[1], prompt])


def test_log_probabilities_are_summed_with_the_stop_token(llama, letters):
    prompt = [3, 4, 5]
    first = by_transformers(llama, prompt, 6)
    stop = first[-1]
    (answer,) = Engine(llama, letters, [stop]).generate([prompt], SamplingOptions(max_new_tokens=9))[0]
    ids = [*prompt, *answer.ids, stop]
    given = torch.log_softmax(llama(torch.tensor([ids])).logits[0].double(), -1)[range(2, len(ids) - 1), ids[3:]]
    assert answer.ended == "stop"
    assert answer.logprob == pytest.approx(float(given.detach().sum()), abs=1e-4)


def test_an_adapter_generates_as_it_is(letters):
    from peft import LoraConfig, get_peft_model

    model = random_model("llama", torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    prompts = some_prompts(5)
    found = Engine(adapted, letters, []).generate(prompts, SamplingOptions(max_new_tokens=8))
    assert [own[0].ids for own in found] == [by_transformers(adapted, prompt, 8) for prompt in prompts]
    assert adapted.get_base_model().config._attn_implementation == "eager", "it is left as it was"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt2"])
def test_a_prompt_goes_on_from_what_was_read_before(kind):
    model = random_model(kind)
    with torch.inference_mode():
        model.set_attn_implementation(NAME)
        reader = SlotReader(TreeModel(model, one_by_one="it generates"), 3, shared=2, kept=30)
        first, other = [3, 4, 5, 6, 7, 8], [9, 8, 7]
        reader.join([first, other])
        reader.step([10, 11])
        reader.drop(0)
        goes_on, new = [*first, 10, 12, 13], [20, 21]
        logits, _, reused = reader.join([new, goes_on])
        assert reused == [0, 7], "the first seven tokens of the second were known"
        found = [*zip(([*other, 11], new, goes_on), [reader.step([1, 2, 3])[0], *logits], strict=True)]
        found[0] = ([*other, 11, 1], found[0][1])
        model.set_attn_implementation("eager")
        for ids, own in found:
            torch.testing.assert_close(own, model(torch.tensor([ids])).logits[0, -1], atol=1e-6, rtol=1e-6)


def test_what_is_kept_is_bounded_and_what_was_used_last_stays():
    kept = Kept(10)
    kept.keep([1, 2, 3, 4], {0: "a"})
    kept.keep([5, 6, 7, 8], {0: "b"})
    assert kept.find([1, 2, 3, 9], 2) == ({0: "a"}, 3)
    kept.keep([1, 2], {0: "c"})
    assert kept.find([1, 2, 9], 2) == ({0: "a"}, 2)
    kept.keep([7, 7, 7], {0: "d"})
    assert kept.find([5, 6, 7, 8, 9], 2) is None, "used least lately"
    assert kept.find([1, 2], 2) is None, "the last token is read in any case"
    kept.keep([1, 2, 3, 4, 5], {0: "e"})
    assert [layers for _, layers in kept._read] == [{0: "d"}, {0: "e"}], "what goes on from one takes its place"
    assert not kept.takes(range(11))


def test_answers_come_and_go_and_change_nobody(llama, letters):
    """Joined at any time, drawn in any way, left in the middle: what is said is what each says alone."""
    engine = Engine(llama, letters, [7])
    ways = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.8, top_k=9, repetition_penalty=1.2)]
    prompts = some_prompts(12)

    def job(number):
        return engine.job(prompts[number], ways[number % 3], 4 + number, prompt=number)

    expected = []
    for number in range(12):
        alone = engine.batch(1)
        alone.add([own := job(number)])
        while alone.busy:
            alone.advance()
        alone.close()
        expected.append(own.said)
    batch = engine.batch(4, kept=200)
    jobs = [job(number) for number in range(12)]
    left = {jobs[2], jobs[10]}
    waiting = list(jobs)
    for step in range(200):
        if step % 3 == 0 and waiting:
            batch.add([waiting.pop(0)])
        if step == 8:
            assert jobs[2].ended is None
            batch.leave(jobs[2])
        if step == 35:
            batch.leave(jobs[10])
        if batch.busy:
            batch.advance()
    assert not batch.busy
    for number, each in enumerate(jobs):
        assert each.said == expected[number][: len(each.said)]
        assert (each.ended is None) == (each in left)
        assert each in left or each.said == expected[number]
    batch.close()
    assert llama.config._attn_implementation != NAME


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_prompt_is_told_of(kind, letters):
    model = random_model(kind, torch.float32)
    engine = Engine(model, letters, [])
    batch = engine.batch(3)
    jobs = [engine.job([3, 4, 5, 9, 9, 2], Sampling(), limit) for limit in (0, 1, 3)]
    for each in jobs:
        each.told_top = each.top = 2
    batch.add(jobs)
    while batch.busy:
        batch.advance()
    expected = torch.log_softmax(model(torch.tensor([[3, 4, 5, 9, 9, 2]])).logits[0], -1)
    for each in jobs:
        assert each.ended == "length"
        assert len(each.drawn) == each.limit
        assert each.told.logprobs == pytest.approx(
            [expected[at, id].item() for at, id in enumerate([4, 5, 9, 9, 2])], abs=1e-4
        )
        assert [own[0][0] for own in each.told.top] == expected[:-1].argmax(-1).tolist()
        assert all(len(own) == 2 for own in each.told.top)
    assert jobs[2].drawn[0].top[0] == (jobs[2].drawn[0].id, jobs[2].drawn[0].logprob)


def test_a_models_attention_is_what_it_was_before(letters):
    """Not what it was when the engine was made: what reads trees sets another meanwhile."""
    model = random_model("llama", torch.float32)
    engine = Engine(model, letters, [])
    TreeModel(model)
    before = model.config._attn_implementation
    engine.generate([[3, 4, 5]], SamplingOptions(max_new_tokens=2))
    assert model.config._attn_implementation == before != NAME


def test_nobody_is_forgotten_where_memory_runs_out(llama, letters, monkeypatch):
    engine = Engine(llama, letters, [])
    batch = engine.batch(4)
    jobs = [engine.job([3, 4, 5], Sampling(), 4) for _ in range(3)]
    batch.add(jobs)

    def join(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(SlotReader, "join", join)
        with pytest.raises(MemoryError):
            batch.advance()
    assert batch.abandon() == jobs
    batch.add(again := [engine.job([3, 4, 5], Sampling(), 4)])
    while batch.busy:
        batch.advance()
    assert again[0].ended == "length"
    batch.close()


@pytest.mark.parametrize("kinds", [("many", "long"), ("long", "many")], ids=" ".join)
def test_memory_is_taken_for_what_is_in_use(kinds):
    """Not for as many answers as there ever were, each as long as the longest ever was."""
    model = random_model("llama")
    first, second = ({"many": [[6, 7]] * 31, "long": [[5] * 500]}[kind] for kind in kinds)
    with torch.inference_mode():
        model.set_attn_implementation(NAME)
        reader = SlotReader(TreeModel(model, one_by_one="it generates"), 32)
        reader.join([[3, 4], *first])
        for row in range(len(first), 0, -1):
            reader.drop(row)
        rows = [[3, 4], *second]
        reader.join(second)
        keys, _ = reader._slots._layers[0]
        assert len(rows) <= keys.shape[0] <= 2 * len(rows)
        assert keys.shape[2] <= 2 * max(map(len, rows)) + 64
        logits = reader.step([9] * len(rows))
        model.set_attn_implementation("eager")
        for own, ids in ((logits[0], [3, 4, 9]), (logits[-1], [*rows[-1], 9])):
            torch.testing.assert_close(own, model(torch.tensor([ids])).logits[0, -1], atol=1e-6, rtol=1e-6)
