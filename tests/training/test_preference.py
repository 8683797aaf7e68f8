"""Preference objectives against separate sequences through an unmodified model, written from the formulas."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from instil.errors import TrainingError
from instil.model.forward import TreeModel
from instil.model.quantize import quantize
from instil.objectives import supervised
from instil.objectives.preference import Kto, Preference, with_others
from instil.packing import TokenTree, concatenate, merge
from instil.packing.tree import expand
from instil.training import reference
from instil.training.events import Step, chosen_fell
from instil.training.loop import evaluate, fit
from instil.training.options import TrainOptions
from instil.training.reference import with_reference

from .tiny import Witness, exchange, furthest, gpt2, llama, one_thread, reader, weights_of

FORMULAS = ["dpo", "cdpo", "ipo", "simpo", "orpo"]


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


def labelled(prompt, completion, label):
    return replace(exchange(prompt, completion), label=label)


def ids(rng, low=1, high=12):
    return rng.integers(1, 60, int(rng.integers(low, high))).tolist()


def pair_rows(count=6, seed=0):
    """Rows of one to three rejected answers; every third one's answers have a second turn, and all have a system."""
    rng = np.random.default_rng(seed)
    system = ids(rng, 5, 6)
    rows = []
    for number in range(count):
        prompt = system + ids(rng)
        row = []
        for label in ["chosen", *["rejected"] * (1 + number % 3)]:
            answer = ids(rng)
            row.append(labelled(prompt, answer, label))
            if number % 3 == 0:
                row.append(labelled(prompt + answer + ids(rng, 2, 5), ids(rng), "more"))
        rows.append(row)
    return rows


def good_and_bad_rows(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [[labelled(ids(rng), ids(rng), "good" if number % 3 else "bad")] for number in range(count)]


def trees_of(rows):
    return [TokenTree.from_exchanges(row, record=number) for number, row in enumerate(rows)]


def answers_of(row):
    """The answers of a row: label and turns."""
    found = []
    for each in row:
        if each.label == "more":
            found[-1][1].append(each)
        else:
            found.append((each.label, [each]))
    return found


def log_prob(model, turns):
    """Of the completions of some exchanges, each read by itself, and the number of their tokens."""
    total, length = 0.0, 0
    for each in turns:
        sequence = torch.tensor([*each.prompt_ids.tolist(), *each.completion_ids.tolist()])
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        scores = torch.log_softmax(logits.double(), -1)[torch.arange(len(sequence) - 1), sequence[1:]]
        total = total + scores[len(each.prompt_ids) - 1 :].sum()
        length += len(each.completion_ids)
    return total, length


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def naive(formula, model, before, rows, beta=0.3, smoothing=0.2, margin=0.7, sft=0.0):
    """The mean over the pairs of the formula, as its paper has it."""
    losses, right = [], []
    for row in rows:
        (_, chosen), *rejected = answers_of(row)
        w, w_length = log_prob(model, chosen)
        w_ref = log_prob(before, chosen)[0].detach()
        for _, turns in rejected:
            lo, l_length = log_prob(model, turns)
            l_ref = log_prob(before, turns)[0].detach()
            ahead = beta * ((w - w_ref) - (lo - l_ref))
            if formula == "dpo":
                loss = -torch.log(sigma(ahead))
            elif formula == "cdpo":
                loss = -(1 - smoothing) * torch.log(sigma(ahead)) - smoothing * torch.log(sigma(-ahead))
            elif formula == "ipo":
                loss = ((w - w_ref) / w_length - (lo - l_ref) / l_length - 1 / (2 * beta)) ** 2
            elif formula == "simpo":
                loss = -torch.log(sigma(beta * w / w_length - beta * lo / l_length - margin))
            else:
                p, q = torch.exp(w / w_length), torch.exp(lo / l_length)
                loss = -beta * torch.log(sigma(torch.log((p / (1 - p)) / (q / (1 - q)))))
            losses.append(loss - sft * w / w_length)
            plain = w / w_length - lo / l_length if formula in ("simpo", "orpo") else ahead
            right.append(float(plain.detach()) > 0)
    return torch.stack(losses).mean(), sum(right) / len(right)


def objective_of(formula, sft=0.0):
    smoothing, margin = (0.2 if formula == "cdpo" else 0.0), (0.7 if formula == "simpo" else 0.0)
    return Preference(formula, beta=0.3, label_smoothing=smoothing, margin=margin, sft_weight=sft)


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def read_back(model, objective, batches):
    """Loss, gradients and measures of batches as one step."""
    model.model.zero_grad()
    ready = objective.ready(model, batches, lambda *values: list(values))
    weight = sum(map(ready.weight, batches))
    loss, sums = 0.0, []
    for batch in batches:
        part, told = ready.loss(model, batch)
        (part / weight).backward()
        loss += float(part.detach()) / weight
        sums.append(told)
    return loss, gradients(model.model), ready.measures([sum(each) for each in zip(*sums, strict=True)])


def moved(model, seed=5):
    """A copy of a model whose weights have gone some way."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for each in other.parameters():
            each.add_(torch.randn_like(each) * 0.05)
    return other


def referenced(before, trees):
    found, _ = with_reference(TreeModel(before), trees)
    return found


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert float((each - expected[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("sft", [0.0, 0.5])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("make", "tolerance"), [(gpt2, 1e-10), (llama, 1e-6)])
def test_loss_and_gradients_are_those_of_separate_sequences(make, tolerance, formula, sft):
    before = make(seed=1).double()
    model, rows = moved(before), pair_rows()
    plain = copy.deepcopy(model)
    expected, right = naive(formula, plain, before, rows, sft=sft)
    expected.backward()
    trees = referenced(before, trees_of(rows))
    tree_model, objective = reader(model), objective_of(formula, sft)
    for batches in ([merge(trees)], [concatenate(trees)], [merge(trees[:2]), merge(trees[2:])]):
        loss, found, measures = read_back(tree_model, objective, batches)
        assert loss == pytest.approx(float(expected.detach()), abs=tolerance)
        same(found, gradients(plain), tolerance)
        assert measures["reward_accuracy"] == pytest.approx(right)
    assert math.isfinite(loss)
    assert 0 < right < 1


def test_log_probabilities_are_those_of_separate_sequences():
    model, rows = gpt2(seed=2).double(), pair_rows()
    found = with_reference(reader(copy.deepcopy(model)), trees_of(rows))[0]
    for row, tree in zip(rows, found, strict=True):
        expected = [float(log_prob(model, [each])[0].detach()) for each in row]
        assert tree.exchange_reference.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("labels", ["good and bad", "chosen and rejected"])
def test_kto_is_that_of_separate_sequences(labels):
    before = gpt2(seed=1).double()
    rows = good_and_bad_rows() if labels == "good and bad" else pair_rows(4)
    trees, alone = with_others(trees_of(rows), 3, most=200)
    assert not alone
    model = moved(before)
    plain = copy.deepcopy(model)
    # Each row's first prompt with the first completion of another row.
    strange = []
    for row, tree in zip(rows, trees, strict=True):
        (other,) = others_in(tree)
        completions = [each[0].completion_ids.tolist() for each in rows]
        assert other in completions
        assert other != row[0].completion_ids.tolist()
        strange.append(labelled(row[0].prompt_ids.tolist(), other, "other"))
    assert len({tuple(each.completion_ids.tolist()) for each in strange}) == len(rows)
    assert merge(trees).trained == sum(len(each.completion_ids) for row in rows for each in row)
    ratios = [log_prob(plain, [each])[0] - log_prob(before, [each])[0] for each in strange]
    divergence = max(0.0, float((sum(ratios) / len(ratios)).detach()))
    losses = []
    for label, turns in (answer for row in rows for answer in answers_of(row)):
        value, length = log_prob(plain, turns)
        ratio = value - log_prob(before, turns)[0].detach()
        good = label in ("good", "chosen")
        ahead = ratio - divergence if good else divergence - ratio
        losses.append((1.5 if good else 0.5) * (1 - sigma(0.3 * ahead)) - (0.25 * value / length if good else 0))
    expected = torch.stack(losses).mean()
    expected.backward()
    trees = referenced(before, trees)
    objective = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, sft_weight=0.25)
    for batches in ([merge(trees)], [merge(trees[:2]), concatenate(trees[2:])]):
        loss, found, measures = read_back(reader(model), objective, batches)
        assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
        assert measures["kl"] == pytest.approx(divergence, abs=1e-10)
        same(found, gradients(plain), 1e-10)


def others_in(tree):
    return [each.completion_ids.tolist() for each in expand(tree) if each.label == "other"]


def test_an_answer_of_another_row_that_does_not_fit_is_left_out_and_counted():
    rows = good_and_bad_rows(5)
    trees = trees_of(rows)
    found, alone = with_others(trees, 0, most=max(tree.size for tree in trees))
    assert alone == sum(not others_in(tree) for tree in found) > 0
    assert with_others(trees[:1], 0, most=100) == ([trees[0]], 1)


def test_without_a_divergence_above_nothing_it_is_nothing():
    """Answers of other rows that became less likely say nothing of how far the model has gone."""
    before = gpt2(seed=1).double()
    trees = referenced(before, with_others(trees_of(good_and_bad_rows()), 3, most=200)[0])
    far = [tree.with_reference(tree.exchange_reference + 5.0) for tree in trees]
    ready = Kto().ready(reader(moved(before)), [merge(far)], lambda *values: list(values))
    assert ready.divergence == 0.0


def test_the_reference_is_the_model_with_its_adapter_off():
    """Both ways to come by it give the same run."""
    rows = pair_rows(8)
    outcomes = []
    for way in ("computed", "adapter"):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = TreeModel(get_peft_model(llama(seed=1), lora))
        trees = trees_of(rows) if way == "adapter" else with_reference(model, trees_of(rows))[0]
        options = TrainOptions(tokens_per_step=80, max_steps=6, learning_rate=5e-2)
        outcomes.append(fit(model, trees, options, tokens_per_batch=200, objective=Preference("dpo", beta=0.5)))
    for one, other in zip(*(each.history for each in outcomes), strict=True):
        assert one.loss == pytest.approx(other.loss, abs=2e-6)
        for name in ("reward_margin", "chosen_logp", "rejected_logp", "kl"):
            assert one.measures[name] == pytest.approx(other.measures[name], abs=1e-4)
    assert outcomes[0].history[-1].loss < 0.68


def test_without_any_reference_it_is_an_error():
    with pytest.raises(TrainingError, match="no adapter to switch off"):
        fit(reader(llama()), trees_of(pair_rows()), TrainOptions(max_steps=1), objective=Preference())


def test_a_run_learns_what_is_preferred_and_says_so():
    before = llama(seed=1)
    trees = referenced(copy.deepcopy(before), trees_of(pair_rows(12)))
    witness = Witness()
    options = TrainOptions(tokens_per_step=200, max_steps=30, learning_rate=1e-2)
    outcome = fit(
        reader(before),
        trees,
        options,
        tokens_per_batch=200,
        held_out=trees[:3],
        objective=Preference("dpo", beta=0.1),
        watchers=[witness],
    )
    first, last = outcome.history[0], outcome.history[-1]
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)  # nothing has moved yet
    assert first.measures["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last.loss < 0.2
    assert last.measures["reward_accuracy"] == 1.0
    assert last.measures["reward_margin"] == pytest.approx(
        last.measures["chosen_reward"] - last.measures["rejected_reward"]
    )
    evaluations = outcome.evaluations
    assert evaluations[0].eval_loss == pytest.approx(math.log(2), abs=1e-5)
    assert evaluations[-1].measures["reward_accuracy"] == 1.0


def test_the_split_into_micro_batches_changes_nothing():
    before = gpt2(seed=1).double()
    trees = referenced(copy.deepcopy(before), trees_of(pair_rows(9)))
    found = []
    for budget in (max(tree.size for tree in trees), 1000):
        model = copy.deepcopy(before)
        options = TrainOptions(tokens_per_step=300, max_steps=4, learning_rate=1e-2)
        outcome = fit(reader(model), trees, options, tokens_per_batch=budget, objective=Preference("ipo"))
        found.append((weights_of(model), [step.loss for step in outcome.history]))
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-9)
    assert furthest(found[0][0], found[1][0]) < 1e-9
    assert furthest(found[0][0], weights_of(before)) > 1e-3


def test_rows_whose_answers_do_not_fit_a_batch_together_are_refused():
    trees = referenced(llama(), trees_of(pair_rows(3)))
    longest = max(tree.longest for tree in trees)
    largest = max(range(3), key=lambda row: trees[row].size)
    assert trees[largest].size > longest
    with pytest.raises(TrainingError, match=f"row {largest}: {trees[largest].size} tokens"):
        fit(reader(llama()), trees, TrainOptions(), tokens_per_batch=longest, objective=Preference())


def test_what_is_kept_is_found_again_and_only_for_the_same_weights_and_tokens(tmp_path):
    trees = trees_of(pair_rows(4))
    model = reader(llama(seed=1))
    first, said = with_reference(model, trees, cache=tmp_path)
    assert "computed" in said
    (file,) = tmp_path.iterdir()
    again, said = with_reference(model, trees, cache=tmp_path)
    assert "found in the cache" in said
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.exchange_reference, other.exchange_reference)
    file.write_bytes(file.read_bytes()[:-8])
    mended, said = with_reference(model, trees, cache=tmp_path)
    assert "computed" in said
    assert np.array_equal(mended[2].exchange_reference, first[2].exchange_reference)
    with torch.no_grad():
        model.base.lm_head.weight[0, 0] += 1e-3
    assert "computed" in with_reference(model, trees, cache=tmp_path)[1]
    assert "computed" in with_reference(model, trees[:3], cache=tmp_path)[1]
    assert len(list(tmp_path.iterdir())) == 3


def test_an_adapter_that_is_scaled_otherwise_is_another_reference(tmp_path):
    """Which stands in no weight."""
    trees = trees_of(pair_rows(2))
    found = []
    for alpha in (8, 16):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        model = TreeModel(get_peft_model(llama(seed=1), lora))
        referenced, said = with_reference(model, trees, cache=tmp_path)
        assert "computed" in said
        assert "found" in with_reference(model, trees, cache=tmp_path)[1]
        found.append(referenced[0].exchange_reference)
    assert not np.allclose(*found)


def test_a_base_in_4_bits_with_other_scales_is_another_reference(tmp_path):
    """They are no parameters of it."""
    trees = trees_of(pair_rows(2))
    model = reader(quantize(llama(seed=1, width=128)))
    whole = with_reference(model, trees, cache=tmp_path)[0][0].exchange_reference
    assert "found" in with_reference(model, trees, cache=tmp_path)[1]
    model.base.model.layers[0].mlp.down_proj.weight.quant_state.state2.absmax.mul_(1.5)
    scaled, said = with_reference(model, trees, cache=tmp_path)
    assert "computed" in said
    assert not np.allclose(whole, scaled[0].exchange_reference)


def test_a_row_that_the_reference_makes_no_number_of_is_named_and_nothing_kept(tmp_path):
    trees = trees_of(pair_rows(6))
    with_token = next(i for i, tree in enumerate(trees) if 59 in tree.input_ids)
    model = reader(llama(seed=1))
    with torch.no_grad():
        model.base.get_input_embeddings().weight[59] = math.nan
    with pytest.raises(TrainingError, match=f"no finite number of .*; the first is row {with_token}"):
        with_reference(model, trees, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_batches_give_each_row_its_own():
    """Rows stand in batches in random order, several in each."""
    trees = trees_of(pair_rows(9))
    model = reader(gpt2(seed=3).double())
    whole = with_reference(model, trees)[0]
    told = []
    parts, _ = with_reference(
        model, trees, tokens_per_batch=max(tree.size for tree in trees), telling=lambda *done: told.append(done)
    )
    assert told == [(number, len(told)) for number in range(len(told))]
    assert len(told) > 2
    for one, other in zip(whole, parts, strict=True):
        assert one.exchange_reference.tolist() == pytest.approx(other.exchange_reference.tolist(), abs=1e-10)
    assert len({round(float(each), 6) for tree in whole for each in tree.exchange_reference}) > 20


def test_supervised_evaluation_is_as_it_was():
    rows = trees_of([[exchange([1, 2, 3], [4, 5])]])
    model = reader(llama())
    loss, measures = evaluate(model, [merge(rows)])
    assert loss == pytest.approx(float(supervised.loss(model, merge(rows))[0].detach()) / 2)
    assert measures == {}


def test_named_trees_name_their_rows():
    trees = trees_of(pair_rows(2))
    assert reference.NamedTrees(trees, trees).name(1) == "row 1"


def histories(values, name="chosen_reward", **more):
    return [Step(n, 1.0, 1e-4, 1.0, 9, 9, 1.0, 1.0, {name: value, **more}) for n, value in enumerate(values, 1)]


def test_it_is_said_where_chosen_answers_become_less_likely():
    with_reference = {"chosen_logp": -9.0, "kl": 1.0}
    assert chosen_fell(histories([0.5] * 20 + [-0.1] * 10, **with_reference)) is not None
    assert chosen_fell(histories([-0.5] * 20 + [0.1] * 10, **with_reference)) is None
    assert chosen_fell(histories([-0.5] * 9, **with_reference)) is None  # too few to say
    falling, noise = np.linspace(-50, -80, 40), np.random.default_rng(0).normal(-50, 20, 40)
    assert "at the beginning" in chosen_fell(histories(falling, "chosen_logp"))
    assert chosen_fell(histories(noise, "chosen_logp")) is None
    assert chosen_fell(histories(falling[::-1], "chosen_logp")) is None
    assert chosen_fell([replace(step, measures={}) for step in histories(falling)]) is None
