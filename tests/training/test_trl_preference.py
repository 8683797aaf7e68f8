"""Preference tuning against TRL's DPOTrainer and KTOTrainer, independent implementations, on the same steps."""

import copy
from dataclasses import replace

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from instil.objectives.preference import Kto, Preference, with_others
from instil.packing.tree import expand
from instil.training.loop import fit
from instil.training.options import TrainOptions
from instil.training.reference import with_reference
from instil.training.steps import Steps

from .tiny import exchange, furthest, llama, make_rows, one_thread, reader, tokenizer, trees_of, weights_of

STEPS, ROWS, ROWS_A_STEP, TOKENS = 10, 20, 4, 60
RATE = 2e-3


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


def rows_of(*labels):
    """Rows of one answer for each label behind a prompt, all of the same number of tokens, so that a step has four."""
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(ROWS):
        prompt = rng.integers(1, 64, rng.integers(2, 9)).tolist()
        answers = TOKENS - len(labels) * len(prompt)
        cuts = np.sort(rng.choice(np.arange(2, answers // 2 - 1), len(labels) - 1, replace=False)) * 2
        lengths = rng.permutation(np.diff([0, *cuts, answers]))
        # Answers of one prompt begin alike, so that they share more than the prompt.
        given = [[7, *rng.integers(1, 64, length - 2).tolist(), 0] for length in lengths.tolist()]
        rows.append([exchange(prompt, answer, label=label) for answer, label in zip(given, labels, strict=True)])
    return rows


def ours(trees, model, objective):
    """The steps of a run with a constant rate, and the rows that each of them held."""
    tokens = ROWS_A_STEP * max(tree.unshared for tree in trees)
    options = TrainOptions(tokens_per_step=tokens, max_steps=STEPS, learning_rate=RATE, schedule="constant", warmup=0.0)
    budget = max(tree.size for tree in trees)
    steps = Steps.of(trees, tokens, budget, "auto", 0)
    planned = [step.tolist() for epoch in range(STEPS) for step in steps.rows(epoch)][:STEPS]
    assert steps.per_epoch < STEPS
    assert all(len(steps.batches(step, number)) > 1 for number, step in enumerate(steps.rows(0)))
    outcome = fit(reader(model), trees, options, tokens_per_batch=budget, objective=objective)
    return outcome.history, planned


def theirs(trainer, config, table, micro_batches, model, folder, **arguments):
    """What TRL logs of each step over given micro-batches of the table's rows. Changes the model."""

    class Ordered(trainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset  # of token ids already

        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_sampler=micro_batches, collate_fn=self.data_collator)

    settings = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        max_steps=STEPS,
        gradient_accumulation_steps=len(micro_batches) // STEPS,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        learning_rate=RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=True,
        **arguments,
    )
    found = Ordered(model, args=settings, train_dataset=datasets.Dataset.from_list(table), processing_class=tokenizer())
    found.train()
    return [each for each in found.state.log_history if "loss" in each]


NAMES = {
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "chosen_logp": "logps/chosen",
    "rejected_logp": "logps/rejected",
}


def check_same(history, logged, names):
    assert len(history) == len(logged) == STEPS
    for step, their in zip(history, logged, strict=True):
        assert step.loss == pytest.approx(their["loss"], abs=1e-4)
        assert step.grad_norm == pytest.approx(their["grad_norm"], rel=1e-4)
        for own, other in names.items():
            if own != "reward_accuracy" or step.step > 1:  # before the first step all is equal but for rounding
                assert step.measures[own] == pytest.approx(their[other], abs=1e-4), own


# In a micro-batch of one pair TRL's `aot`, which sorts its pairs, is cdpo, and its `sft`, a mean over all tokens of the
# micro-batch, is the mean over the answer. Its `robust` has another sign.
@pytest.mark.parametrize(
    ("objective", "rejected", "pairs", "settings"),
    [
        (Preference("dpo", beta=0.3), 1, 2, {"loss_type": ["sigmoid"]}),
        (Preference("dpo", beta=0.3), 2, 4, {"loss_type": ["sigmoid"]}),
        (Preference("ipo", beta=0.3), 1, 2, {"loss_type": ["ipo"]}),
        (Preference("cdpo", beta=0.3, label_smoothing=0.2), 1, 1, {"loss_type": ["aot"], "label_smoothing": 0.2}),
        (
            Preference("dpo", beta=0.3, sft_weight=0.5),
            1,
            1,
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        ),
    ],
)
def test_preference_is_that_of_trl(objective, rejected, pairs, settings, tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = rows_of("chosen", *["rejected"] * rejected)
    one, other = llama(seed=1), llama(seed=1)
    before = copy.deepcopy(weights_of(one))
    history, planned = ours(with_reference(reader(one), trees_of(rows))[0], one, objective)

    table = [
        {
            "prompt_ids": chosen.prompt_ids.tolist(),
            "chosen_ids": chosen.completion_ids.tolist(),
            "rejected_ids": each.completion_ids.tolist(),
        }
        for chosen, *others in rows
        for each in others
    ]
    assert {len(step) for step in planned} == {ROWS_A_STEP}
    in_order = [row * rejected + number for step in planned for row in step for number in range(rejected)]
    micro_batches = [in_order[at : at + pairs] for at in range(0, len(in_order), pairs)]
    logged = theirs(DPOTrainer, DPOConfig, table, micro_batches, other, tmp_path, beta=objective.beta, **settings)

    check_same(history, logged, NAMES)
    assert history[0].measures["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert history[-1].measures["reward_margin"] > 0.1
    assert history[-1].loss < history[0].loss
    assert furthest(before, weights_of(one)) > 2 * RATE
    assert furthest(weights_of(one), weights_of(other)) < RATE / 20


def test_kto_is_that_of_trl(tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = [[replace(each, label="bad" if number % 3 else "good")] for number, (each,) in enumerate(make_rows(ROWS))]
    trees, alone = with_others(trees_of(rows), 0, most=100)
    assert not alone
    one, other = llama(seed=1), llama(seed=1)
    objective = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    history, planned = ours(with_reference(reader(one), trees)[0], one, objective)

    table = [
        {
            "prompt_ids": own.prompt_ids.tolist(),
            "completion_ids": own.completion_ids.tolist(),
            "KL_completion_ids": strange.completion_ids.tolist(),
            "label": own.label == "good",
        }
        for own, strange in map(expand, trees)
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    logged = theirs(KTOTrainer, KTOConfig, table, planned, other, tmp_path, beta=0.3, **weights)

    check_same(history, logged, {"kl": "kl"})
    assert max(step.measures["kl"] for step in history) > 0.01
    assert history[-1].loss < history[0].loss
    assert furthest(weights_of(one), weights_of(other)) < RATE / 20
