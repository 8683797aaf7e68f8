"""The optimizers by name, their state as plain tensors, and the learning rate of each step."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from instil.errors import TrainingError, UsageError, nearest
from instil.training.options import OptimizerName

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_BLOCK, _LEAST = 256, 4096  # of torchao: values with a common scale, values of a tensor that is kept in 8 bits


def make_optimizers(
    name: OptimizerName, model: nn.Module, learning_rate: float, weight_decay: float
) -> tuple[Optimizer, ...]:
    """The optimizers of what is trained. Matrices decay; norms, biases and embeddings do not.

    One learning rate serves all: the root mean square of a step is a fifth to the whole of it, whatever the weights.

    - `adamw`: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    - `adamw-8bit`: the same with its moments in 8 bits, of torchao. Dettmers and others, 8-bit Optimizers via
      Block-wise Quantization, 2022.
    - `adafactor`: no first moment, of the second a row and a column. A step is not scaled by the size of the weights
      (while their root mean square is below 1) nor by its number, as in transformers' `Trainer`. Shazeer and Stern,
      Adafactor, 2018.
    - `muon`: the momentum of hidden matrices, made orthogonal and as large as a step of AdamW, which takes all else:
      embeddings, head, norms, biases, experts in one tensor. Liu and others, Muon is Scalable for LLM Training, 2025.

    Args:
        name: Which.
        model: Its parameters that require a gradient are trained.
        learning_rate: To begin with.
        weight_decay: Part of a weight that is taken off in a step, over the learning rate.

    Raises:
        UsageError: There is no such optimizer, or its package is not installed.
        TrainingError: There is no matrix for Muon, or the model has an adapter.
    """
    groups = _groups(model, weight_decay)
    if name == "adamw":
        return (_adamw(groups, learning_rate),)
    if name == "adamw-8bit":
        return (_torchao().AdamW8bit(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, block_size=_BLOCK),)
    if name == "adafactor":
        # eps: the least root of a second moment, whose square is a number in float32 too, and the least size of weights
        # that steps are scaled by: with 1, the learning rate alone says how long they are.
        return (torch.optim.Adafactor(groups, lr=learning_rate, eps=(1e-16, 1.0)),)
    if name != "muon":
        raise UsageError(f"--optimizer {name}: there is no such optimizer", nearest(name, get_args(OptimizerName)))
    matrices = _matrices(model)
    of_muon = [each for group in groups for each in group["params"] if each in matrices]
    if not of_muon:
        raise TrainingError(
            f"--optimizer muon: {type(model).__name__} has no whole matrix that is trained",
            "Choose --optimizer adamw, which also suits adapters, or train in full.",
        )
    muon = torch.optim.Muon(of_muon, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    others = [{**group, "params": [each for each in group["params"] if each not in matrices]} for group in groups]
    others = [group for group in others if group["params"]]
    return (muon, _adamw(others, learning_rate)) if others else (muon,)


def check_installed(name: OptimizerName) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        UsageError: It is not.
    """
    if name == "adamw-8bit":
        _torchao()


def take_step(optimizers: Sequence[Optimizer], learning_rate: float) -> None:
    """Take a step by the gradients, and drop them.

    Args:
        optimizers: As they were made.
        learning_rate: Of this step.
    """
    _set_rate(optimizers, learning_rate)
    for optimizer in optimizers:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*_stable_hash_for_caching", UserWarning)  # of torch, to torchao
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def state_tensors(optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """What the optimizers have gathered, as plain tensors by name.

    Args:
        optimizers: As they were made.
        names: Of all their parameters.

    Returns:
        `NAME.exp_avg`, `NAME.step` and so on for each parameter: the tensors themselves, no copies. A moment in 8 bits
        is three tensors (`NAME.exp_avg.codes`, `.scale`, `.qmap`). A parameter without a gradient so far has one that
        is empty, `NAME.none`. States of sharded parameters are DTensors.
    """
    found = {}
    for parameter, state in _states(optimizers):
        if not state:
            found[f"{names[parameter]}.{_NONE}"] = torch.empty(0)
        for key, value in state.items():
            found.update(_plain(f"{names[parameter]}.{key}", value))
    return found


def begun_state(
    optimizers: Sequence[Optimizer],
    names: Mapping[nn.Parameter, str],
    kinds: Mapping[str, tuple[torch.dtype, torch.Size]],
) -> dict[str, Tensor]:
    """Have the optimizers make their state, to be filled with what was saved: parameters lose their gradients.

    Args:
        optimizers: Made for the same model by the same name.
        names: Of all their parameters.
        kinds: The type and the whole shape of each tensor that was saved, as `state_tensors` names them.

    Returns:
        The tensors of the state by name, of sharded parameters DTensors laid out like them.

    Raises:
        TrainingError: Tensors are missing, left over, or of another shape or dtype.
    """
    _begin(optimizers, [each for each, name in names.items() if f"{name}.{_NONE}" not in kinds])
    own = state_tensors(optimizers, names)
    wrong = [f"{name} is missing" for name in own if name not in kinds]
    wrong += [f"{name} belongs to nothing" for name in kinds if name not in own]
    for name in own.keys() & kinds.keys():
        fits, given = (f"{kind} {tuple(shape)}" for kind, shape in ((own[name].dtype, own[name].shape), kinds[name]))
        if fits != given:
            wrong.append(f"{name} is {given}, not {fits}")
    if wrong:
        more = f", and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
        raise TrainingError(
            f"the state of the optimizer does not fit: {', '.join(sorted(wrong)[:3])}{more}",
            "Go on with the model, the adapter and the optimizer that it was saved with.",
        )
    return own


def state_bytes(name: OptimizerName, model: nn.Module) -> int:
    """What the state of `make_optimizers` takes once steps have been taken, in bytes.

    Args:
        name: Which.
        model: Its parameters that require a gradient are trained.
    """
    matrices = _matrices(model) if name == "muon" else ()
    return sum(_bytes(name, each, each in matrices) for each in model.parameters() if each.requires_grad)


_NONE = "none"


def _adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=True)


def _torchao() -> Any:
    """The optimizers of torchao, which logs each library of its own that this machine cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.optim
    except ImportError as error:
        raise UsageError("--optimizer adamw-8bit: needs the package torchao", "pip install 'instil[optim]'") from error
    finally:
        logging.disable(before)
    return torchao.optim


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained: matrices, which decay, and all else."""
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = id(parameter) in embeddings or name.endswith("bias") or "trainable_tokens" in name
            groups[parameter.ndim > 1 and not spared].append(parameter)
    return [
        {"params": groups[decays], "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
        if groups[decays]
    ]


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    """What Muon takes: matrices between the embedding and the head. Those of an adapter are factors of one: the product
    of two orthogonal steps is none.
    """
    if hasattr(model, "peft_config"):
        return set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    decaying = [each for group in _groups(model, 1.0) if group["weight_decay"] for each in group["params"]]
    return {each for each in decaying if each.ndim == 2 and each is not getattr(head, "weight", None)}


def _bytes(name: OptimizerName, parameter: nn.Parameter, of_muon: bool) -> int:
    count, size = parameter.numel(), parameter.element_size()
    if of_muon:
        return size * count
    step = 4  # a number in float32
    if name == "adamw-8bit" and count >= _LEAST and count % _BLOCK == 0:
        return step + 2 * (count + 4 * count // _BLOCK + 4 * 256)  # codes, scales, and what the 256 codes stand for
    if name == "adafactor":
        *others, rows, columns = parameter.shape if parameter.ndim > 1 else (1, count, 0)
        return step + size * math.prod(others) * (rows + columns)
    return step + 2 * size * count


def _set_rate(optimizers: Sequence[Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao compiles its step, in which a number would be fixed
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate


def _states(optimizers: Sequence[Optimizer]) -> Iterator[tuple[nn.Parameter, Mapping[str, Tensor]]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, optimizer.state.get(parameter, {})


def _plain(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a tensor of a class of its own is made of."""
    sharded = hasattr(value, "full_tensor")  # a DTensor, whose module takes a second to import
    if not sharded and is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(f"{key}.{name}", getattr(value, name))
    else:
        yield key, value


def _begin(optimizers: Sequence[Optimizer], parameters: Collection[nn.Parameter]) -> None:
    """Have the optimizers make the state of some parameters, by a step with a rate and a gradient of zero.

    As `torch.distributed.checkpoint` does; such a step changes no parameter.
    """
    rate = float(optimizers[0].param_groups[0]["lr"])
    begun = set(parameters)
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter in begun else None
    take_step(optimizers, 0.0)
    _set_rate(optimizers, rate)


def learning_rate(
    step: int, steps: int, warmup_steps: int, peak: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """The learning rate of a step.

    Args:
        step: Counted from 1.
        steps: All of them.
        warmup_steps: Those in which it rises, evenly, from 0 to `peak`.
        peak: The highest.
        schedule: How it goes on: towards 0, which it would reach one step after the last, or not at all.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / max(1, steps - warmup_steps)  # in [0, 1)
    return peak * {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]
