"""The output head and the loss of its rows: the ways to compute them, side by side.

python benchmarks/bench_head.py [--device cpu|cuda] [--rows 1024] [--hidden 512] [--vocabulary 32000] [--repeats 5]

plain          logits in bf16 and Instil's own cross-entropy (`instil.model.forward`): what a CPU trains with
pieces         the same in pieces of an eighth, each computed again going back: what is done beyond `LOGITS_AT_ONCE`
torch          `torch.nn.functional.linear_cross_entropy` in chunks, gradients summed accurately: what CUDA trains with
torch, chunks  the same in chunks of 128 rows
Liger          `LigerFusedLinearCrossEntropyFunction` of liger-kernel, where it is installed (CUDA alone)
CCE            `linear_cross_entropy` of cut-cross-entropy, where it is installed (CUDA alone)

Each way is given the same rows of hidden states, the same weights in float32 and the same targets, and runs forward and
back under bf16 autocast. `ms` is the median of the repeats, which take turns; `MB` the most memory of one on CUDA.
`loss` and `gradient` are the relative errors against float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from instil.model.forward import cross_entropy, fused_cross_entropy

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(torch.nn.functional.linear(hidden, weight), torch.arange(len(ids), device=ids.device), ids)


def pieces(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    size = -(-len(ids) // 8)
    parts = zip(hidden.split(size), ids.split(size), strict=True)
    return torch.cat([checkpoint(plain, part, weight, those, use_reentrant=False) for part, those in parts])


def of_torch(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return fused_cross_entropy(hidden, weight, None, ids)


def in_chunks(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, acc_policy="accurate")
    kept = weight.to(hidden.dtype)
    return torch.nn.functional.linear_cross_entropy(hidden, kept, ids, reduction="none", options=options)


def liger(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    kept = weight.to(hidden.dtype)
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, kept, ids, None, None, -100, 0.0, 0.0, "none")[0]


def cce(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight.to(hidden.dtype), ids, reduction="none")


def ways(device: str) -> dict[str, Way]:
    found: dict[str, Way] = {"plain": plain, "pieces": pieces, "torch": of_torch, "torch, chunks": in_chunks}
    for name, way, module in (("Liger", liger, "liger_kernel"), ("CCE", cce, "cut_cross_entropy")):
        if device == "cuda" and importlib.util.find_spec(module):
            found[name] = way
    return found


def once(way: Way, hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor) -> tuple[float, float, list[Tensor]]:
    """Milliseconds, megabytes, and the loss with the gradients of the rows and of the weights."""
    cuda = hidden.is_cuda
    leaf, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss = way(leaf, head, ids).float() @ weights
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    took = 1000 * (time.perf_counter() - began)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else float("nan")
    return took, peak, [loss.detach(), leaf.grad, head.grad]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(chosen.rows, chosen.hidden).bfloat16().to(chosen.device)
    weight = (torch.randn(chosen.vocabulary, chosen.hidden) / chosen.hidden**0.5).to(chosen.device)
    ids = torch.randint(0, chosen.vocabulary, (chosen.rows,), device=chosen.device)
    weights = torch.rand(chosen.rows, device=chosen.device) / chosen.rows

    leaf, head = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(leaf @ head.T, ids, reduction="none") @ weights.double()
    exact.backward()
    expected = [exact.detach(), leaf.grad, head.grad]

    found = ways(chosen.device)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    errors = {}
    for _ in range(chosen.repeats + 1):  # the first warms up
        for name, way in found.items():
            took, peak, results = once(way, hidden, weight, ids, weights)
            taken[name].append((took, peak))
            errors[name] = [
                float((one - other).norm() / other.norm()) for one, other in zip(results, expected, strict=True)
            ]
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}: {chosen.rows:,} rows of {chosen.hidden}, {chosen.vocabulary:,} tokens\n"
    )
    print("| | ms | MB | loss | gradient of rows | gradient of weights |\n| --- | --- | --- | --- | --- | --- |")
    for name, runs in taken.items():
        took, peak = (statistics.median(values) for values in zip(*runs[1:], strict=True))
        said = " | ".join(f"{error:.1e}" for error in errors[name])
        print(f"| {name} | {took:.0f} | {'' if peak != peak else f'{peak:.0f}'} | {said} |")


if __name__ == "__main__":
    main()
