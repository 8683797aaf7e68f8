"""A whole run against TRL's SFTTrainer, an independent implementation, on the same tokens in the same steps."""

import copy
import warnings

import datasets
import pytest
from torch.utils.data import DataLoader

from instil.training.loop import fit
from instil.training.options import TrainOptions
from instil.training.steps import Steps

from .tiny import Witness, furthest, llama, make_rows, one_thread, reader, tokenizer, trees_of, weights_of

STEPS, WARMUP, BUDGET = 20, 4, 128
RATE = 5e-3


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


def sft(model, rows, micro_batches, folder, **arguments) -> list[dict[str, float]]:
    """TRL's run over given micro-batches of rows, two a step; what it logs of each step. Changes the model."""
    from trl import SFTConfig, SFTTrainer

    class Ordered(SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_sampler=micro_batches, collate_fn=self.data_collator)

        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if "embed_tokens" not in name]

        def create_scheduler(self, num_training_steps, optimizer=None):
            # Its first rate is 0 and its last is not: one step more of each, and the first one taken here.
            super().create_scheduler(num_training_steps + 1, optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the scheduler goes before the optimizer
                self.lr_scheduler.step()
            return self.lr_scheduler

    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        lr_scheduler_type="cosine",
        learning_rate=RATE,
        warmup_steps=WARMUP + 1,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    table = {
        "input_ids": [[*each.prompt_ids.tolist(), *each.completion_ids.tolist()] for (each,) in rows],
        "completion_mask": [[0] * len(each.prompt_ids) + [1] * len(each.completion_ids) for (each,) in rows],
    }
    trainer = Ordered(model, config, train_dataset=datasets.Dataset.from_dict(table), processing_class=tokenizer())
    trainer.train()
    return [each for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("prompt_weight", [0.0, 1.0])
def test_a_run_is_that_of_trl(prompt_weight, weight_decay, tmp_path):
    rows = make_rows(60, prompt_weight=prompt_weight)
    trees = trees_of(rows)
    steps = Steps.of(trees, 120, BUDGET, "on", 0)
    epochs = -(-STEPS // steps.per_epoch)
    planned = [step.tolist() for epoch in range(epochs) for step in steps.rows(epoch)][:STEPS]
    assert epochs > 1
    assert min(map(len, planned)) >= 2

    ours, theirs = llama(seed=1), llama(seed=1)
    before = copy.deepcopy(weights_of(ours))
    options = TrainOptions(
        tokens_per_step=120,
        max_steps=STEPS,
        learning_rate=RATE,
        warmup=WARMUP / STEPS,
        weight_decay=weight_decay,
    )
    witness = Witness()
    outcome = fit(reader(ours), trees, options, tokens_per_batch=BUDGET, share_prefixes="on", watchers=[witness])
    assert witness.resolved.settings["warmup_steps"] == WARMUP

    halves = [half for step in planned for half in (step[: len(step) // 3 + 1], step[len(step) // 3 + 1 :])]
    logged = sft(theirs, rows, halves, tmp_path, weight_decay=weight_decay, completion_only_loss=prompt_weight == 0)

    assert len(outcome.history) == len(logged) == STEPS
    for our, their in zip(outcome.history, logged, strict=True):
        assert our.loss == pytest.approx(their["loss"], abs=1e-5)
        assert our.grad_norm == pytest.approx(their["grad_norm"], rel=1e-4)
        assert our.learning_rate == pytest.approx(their["learning_rate"], rel=1e-9)
    assert outcome.history[-1].loss < outcome.history[0].loss - 0.5
    assert furthest(before, weights_of(ours)) > 10 * RATE
    assert furthest(weights_of(ours), weights_of(theirs)) < 2e-5
