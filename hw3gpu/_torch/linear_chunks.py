"""Cross entropy of logits x Wᵀ + b, of which there is never more than a chunk of rows: docs/derivations.md, section 3.7.

    dz = ∂ℓ/∂z of a chunk,   ∂ℓ/∂x = dz W,   ∂ℓ/∂W = Σ_chunks dzᵀ x,   ∂ℓ/∂b = Σ_rows dz

The products are torch's, loss and dz this library's kernels', sums over chunks are taken in float32 (float64 for float64).
A reduced loss makes its gradients in the forward pass, for an upstream gradient of 1: three products, and dz takes the place of
the chunk's logits. In float16 they are those of the sum, so that no 1/n makes them subnormal, and meet upstream/n when that is
known; dz of a chunk is multiplied by a power of two, for which its rows' losses are computed first (`float16_scale`). Without a
reduction, and for a second call of backward, backward makes each chunk's logits again: four products. Without a reduction few
logits, or a chunk of all rows, are held instead: three.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import arrays, dispatch, record
from . import class_range, cross_entropy_formula, float16_scale
from .autograd import accumulate_dtype, as_dtype, gradients_with_a_graph
from .cross_entropy_formula import CrossEntropyStatistics, Options, never_zero, target_gradient

# A part of all rows keeps the peak below a tenth of the logits; on the host, half of it in half precision, whose products have
# buffers of their own there (oneDNN's, with AVX-512 that has no bfloat16 instructions, up to six chunks: it is more there).
# Fewer bytes make slow products, more make none faster. The peak counts gradients and one float32 ∂ℓ/∂W. In float32 that is
# one tensor, and in half precision the gradient is made of it when the chunks are gone: a chunk may take as many numbers as W
# has. On a GPU the number of chunks is how often the float32 ∂ℓ/∂W is read and written.
PARTS, PARTS_OF_HALVES_ON_THE_HOST = 11, 22
LEAST, MOST = 1 << 20, 1 << 29
HELD = 1 << 25  # bytes of logits that are made once and held for the backward pass, where others are made again
TILE = 128  # rows of a chunk on a device, numbers from one row of logits to the next, and classes of a product: whole tiles
HALVES = (torch.float16, torch.bfloat16)


class Problem(NamedTuple):
    """x (N, D), W (V S, D), b (V S) or None, target (N, S) or (N, V, S), and class weights (V,) or None."""

    x: Tensor
    W: Tensor
    b: Tensor | None
    target: Tensor
    weight: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N, V, S) of the logits."""
        S = self.target.shape[-1]
        return self.x.shape[0], self.W.shape[0] // S if S else 0, S

    def chunk(self, first: int, last: int) -> Problem:
        """The problem of the rows first…last - 1."""
        return self._replace(x=self.x[first:last], target=self.target[first:last])


class Found(NamedTuple):
    """What the forward pass finds; the gradients of x, W and b are for an upstream gradient of 1, of the sum where `of_sum`.

    Each row of the gradient of x is to be multiplied by its `factor`, (N, 1), unless that is None.
    """

    loss: Tensor
    numbers: Tensor
    denominator: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    factor: Tensor | None = None


def chunk_rows(problem: Problem, of_W: bool = True) -> int:
    """Rows of a chunk, unless the caller says otherwise. of_W: ∂ℓ/∂W is summed over the chunks."""
    (N, D), wide = problem.x.shape, max(problem.W.shape[0] * problem.x.element_size(), 1)
    half = problem.x.dtype in HALVES
    slow = half and arrays.on_host(problem.x)
    part = N // (PARTS_OF_HALVES_ON_THE_HOST if slow else PARTS)
    as_W = 0 if half and (slow or not of_W) else D
    return whole_tiles(problem, min(max(part, LEAST // wide, as_W), MOST // wide))


def whole_tiles(problem: Problem, most: int) -> int:
    """At most so many rows: on a device as few as make no more chunks, in whole tiles, or in eights where they are few."""
    N, most = problem.x.shape[0], max(most, 1)
    if arrays.on_host(problem.x):
        return most
    tile = next(t for t in (TILE, 8, 1) if most >= t)
    most = most // tile * tile
    return min(most, -(-N // max(-(-N // most), 1) // tile) * tile) if most < N else most


def chunks(problem: Problem, rows: int) -> list[tuple[int, int]]:
    N = problem.x.shape[0]
    return [(first, min(first + rows, N)) for first in range(0, N, rows)]


def logits_buffer(problem: Problem, rows: int) -> Tensor:
    """What a chunk's logits are written to, (rows, V S); its rows begin at whole tiles."""
    (N, V, S), x = problem.sizes, problem.x
    return x.new_empty(min(rows, N), -(-V * S // TILE) * TILE)[:, : V * S]


def to_hold(problems: Sequence[Problem], rows: int) -> list[Tensor]:
    """Memory for the logits of all rows where they are kept for the backward pass, which then does not make them again: where
    they are few bytes, or the caller asked for chunks of all rows. Else an empty list."""
    N, of = problems[0].x.shape[0], sum(p.W.shape[0] * p.x.element_size() for p in problems)
    holds = rows >= N if rows else N * of <= HELD
    return [logits_buffer(p, N) for p in problems] if holds and N else []


def logits_of(problem: Problem, out: Tensor) -> Tensor:
    """x Wᵀ + b of a chunk, written to `out`; returned as (n, V, S)."""
    n, (_, V, S) = problem.x.shape[0], problem.sizes
    out = out[:n]
    if problem.b is None:
        torch.mm(problem.x, problem.W.t(), out=out)
    else:
        torch.addmm(problem.b, problem.x, problem.W.t(), out=out)
    record.note(f"logits of {out.shape[0]} rows at a time, a product by PyTorch, then the kernels")
    record.note_made("logits of the chunk", out)
    return out.view(n, V, S)


# ---------------------------------------------------------------------------------------------- forward and backward
def run(
    problem: Problem, options: Options, rows: int, numbers: int = 3, needs: Sequence[bool] = (False, False, False),
    of_sum: bool = False, factors: Tensor | None = None, held: Sequence[Tensor] = (),
) -> Found:  # fmt: skip
    """The reduced loss, `numbers` of every row, what the gradient is divided by (None for 1), and the gradients that `needs`
    names, of x, W and b. factors: (N, S), what the losses of the rows are multiplied by before they are added up. held: memory
    for all logits, where the gradients are made later, or none."""
    x, (N, _, S) = problem.x, problem.sizes
    which = dispatch.backend(x)
    view, kernels = dispatch.kernel_view(which), dispatch.cross_entropy(which)
    acc, device = accumulate_dtype(x), x.device
    loss, stats = torch.empty((N, S), dtype=acc, device=device), torch.empty((numbers, N, S), dtype=acc, device=device)
    weight_view, target_view = view(problem.weight), view(problem.target)
    total, denominator = torch.empty((), dtype=acc, device=device), torch.empty(1, dtype=acc, device=device)
    if options.reduction == "mean":
        kernels.count(target_view, weight_view, view(denominator), ignore_index=options.ignore_index)
        never_zero(denominator, options)
    over = view(denominator) if options.reduction == "mean" and not of_sum else None
    gradients = Gradients(problem, needs)
    largest = float16_scale.largest_element(problem.W) if x.dtype == torch.float16 and any(needs) else None
    factor = None if largest is None else torch.ones((N, 1), dtype=acc, device=device)
    z, rows = (held[0], N) if held else (logits_buffer(problem, rows), rows)
    invalid = judge_targets(problem, options.ignore_index)
    for first, last in chunks(problem, rows):
        part = problem.chunk(first, last)
        logits, of_rows = logits_of(part, z), torch.empty((numbers, last - first, S), dtype=acc, device=device)
        given = (view(logits), view(part.target), weight_view, view(loss[first:last]))
        if not any(needs) or factor is not None:
            kernels.forward(*given, view(of_rows), view(invalid), **options.of_rows)
        of_upstream = None if factors is None else factors[first:last]
        if factor is not None and largest is not None:
            shrink = float16_scale.of_chunk(part, loss[first:last], of_rows, options, largest, of_upstream)
            kernels.forward_backward(
                *given, given[0], view(invalid), upstream=view(of_upstream), denominator=view(shrink), **options.of_rows
            )
            factor[first:last] = shrink
            gradients.add(part, logits, first, last, shrink)
        elif any(needs):  # dz takes the place of the logits
            kernels.forward_backward(
                *given, given[0], view(invalid), stats=view(of_rows), upstream=view(of_upstream), denominator=over,
                **options.of_rows,
            )  # fmt: skip
            gradients.add(part, logits, first, last)
        stats[:, first:last] = of_rows
    if options.reduction == "none":
        return Found(loss, stats, None)
    if factors is not None:
        return Found(cross_entropy_formula.multiplied(loss, factors).sum(), stats, None, gradients.found, factor)
    kernels.reduce(
        view(loss), target_view, weight_view, view(total.view(1)), view(denominator), ignore_index=options.ignore_index
    )
    if options.reduction == "sum":
        return Found(total, stats, None, gradients.found, factor)
    return Found(total / never_zero(denominator, options).view(()), stats, denominator, gradients.found, factor)


def run_backward(
    upstream: Tensor, problem: Problem, numbers: Tensor, denominator: Tensor | None, options: Options, rows: int,
    needs: Sequence[bool], factors: Tensor | None = None, held: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients that `needs` names, of x, W, b and target, by logits held or made again; W's and b's in the sums' dtype."""
    x, (N, V, S) = problem.x, problem.sizes
    which = dispatch.backend(x)
    view, kernels = dispatch.kernel_view(which), dispatch.cross_entropy(which)
    rows = N if held else whole_tiles(problem, rows // 2)  # of logits and dz
    upstream = upstream.reshape(N, S) if options.reduction == "none" else upstream.expand(N, S)
    upstream = upstream if factors is None else upstream * factors
    gradients = Gradients(problem, needs[:3])
    dtarget = torch.empty_like(problem.target) if needs[3] else None
    dz, z = logits_buffer(problem, rows), held[0] if held else logits_buffer(problem, rows)
    of_rows = options._replace(reduction="none")  # upstream is one number a row by now
    for first, last in chunks(problem, rows):
        part, of_chunk, g = problem.chunk(first, last), numbers[:, first:last].contiguous(), upstream[first:last]
        logits = z.view(N, V, S) if held else logits_of(part, z)
        out = dz[: last - first].view(last - first, V, S)
        given = (logits, part.target, problem.weight, of_chunk)
        kernels.backward(*map(view, (*given, g, denominator, out)), **options.of_rows)
        gradients.add(part, out, first, last)
        if dtarget is not None:
            dtarget[first:last] = target_gradient(g, *given, denominator, of_rows)
    return *gradients.found, dtarget


class Gradients:
    """∂ℓ/∂x, and the sums over chunks of ∂ℓ/∂W and ∂ℓ/∂b, where needed. The chunks come in order."""

    def __init__(self, problem: Problem, needs: Sequence[bool]) -> None:
        acc = accumulate_dtype(problem.x)
        self.dx = torch.empty_like(problem.x, memory_format=torch.contiguous_format) if needs[0] else None
        make = torch.empty_like if len(problem.x) else torch.zeros_like  # the first chunk writes it
        self.dW = make(problem.W, dtype=acc, memory_format=torch.contiguous_format) if needs[1] else None
        self.db = None if problem.b is None or not needs[2] else torch.zeros_like(problem.b, dtype=acc)

    @property
    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.dx, self.dW, self.db

    def add(self, part: Problem, dz: Tensor, first: int, last: int, shrink: Tensor | None = None) -> None:
        """What the rows first…last give, whose dz is (n, V, S); ∂ℓ/∂W and ∂ℓ/∂b are multiplied by `shrink`, (1,)."""
        dz = dz.view(last - first, part.W.shape[0])
        if self.dx is not None:
            torch.mm(dz, part.W, out=self.dx[first:last])
        if self.dW is not None:
            _add_product(self.dW, dz, part.x, shrink, keep=first > 0)
        if self.db is not None:
            of_rows = dz.sum(0, dtype=self.db.dtype)
            self.db += of_rows if shrink is None else of_rows * shrink


def _add_product(dW: Tensor, dz: Tensor, x: Tensor, shrink: Tensor | None, keep: bool) -> None:
    """dW = dzᵀ x shrink, and what was there if `keep`: one product, where it sums and writes in dW's dtype."""
    if dW.dtype == dz.dtype:
        dW.addmm_(dz.t(), x, beta=int(keep))
    elif shrink is None and sums_in_float32(dz):
        torch.addmm(dW, dz.t(), x, out_dtype=dW.dtype, beta=int(keep), out=dW)
    else:
        _add_in_slices(dW, dz, x, shrink, keep)


def sums_in_float32(x: Tensor) -> bool:
    """Whether PyTorch's products of half precision add to float32 here: those of CUDA do, on a host or by ROCm none."""
    if arrays.on_host(x) or torch.version.hip is not None:
        return False
    return x.dtype != torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


def _add_in_slices(dW: Tensor, dz: Tensor, x: Tensor, shrink: Tensor | None, keep: bool) -> None:
    """The same of half precision by products of some classes each, a small part of dz, which float32 sums take up."""
    step = max(dz.numel() // (8 * max(x.shape[1], 1)) // TILE, 2) * TILE
    count = -(-dz.shape[1] // step)
    record.note(f"∂ℓ/∂W of {len(x)} rows in {count} products of half precision by PyTorch, each added to float32")
    for first in range(0, dz.shape[1], step):
        product, out = dz[:, first : first + step].t() @ x, dW[first : first + step]
        if not keep:
            torch.mul(product, 1 if shrink is None else shrink, out=out)
        elif shrink is None:
            out += product
        else:
            out.addcmul_(product, shrink)


def judge_targets(problem: Problem, ignore_index: int) -> Tensor:
    """Reports a class out of range, at once on the host, later on a GPU; returns a flag for the kernels to write to."""
    target, (N, V, S) = problem.target, problem.sizes
    scratch = torch.full((1,), N * S, dtype=torch.int64, device=target.device)
    if target.is_floating_point() or not target.numel():
        return scratch
    if arrays.on_host(target):
        class_range.check_classes(target, V, ignore_index)
    elif target.device.type == "cuda":
        bad = class_range.out_of_range(target, V, ignore_index)
        row = torch.where(bad.reshape(-1).any(), bad.reshape(-1).to(torch.uint8).argmax(), class_range.NONE)
        flag = class_range.flag(target, N * S)
        torch.minimum(flag, row, out=flag)
        if class_range.looks(target.device):
            class_range.watch(target.device).send()
    return scratch


# ---------------------------------------------------------------------------------------------- gradients to hand out
def as_given(gradients: Iterable[Tensor | None], of: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Each gradient in the dtype of its tensor; the last tensors may have none."""
    return tuple(None if g is None or v is None else as_dtype(g, v.dtype) for g, v in zip(gradients, of, strict=False))


def fake_gradients(of: Iterable[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Contiguous gradients of the tensors that `needs` names, without their elements."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed and t is not None else None
        for t, needed in zip(of, needs, strict=True)
    )


def scaled(
    held: Sequence[Tensor | None], upstream: Tensor, denominator: Tensor | None, factor: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the forward pass for another upstream gradient, in place."""
    # with version counts of their own, so that a write into one does not count as one into the saved tensor
    held = [None if g is None else g.data for g in held]
    scale = upstream if denominator is None else upstream / denominator[0]
    if factor is not None and held[0] is not None:
        held[0].mul_(scale * factor)
    if not arrays.on_host(scale):
        scale = scale.reshape(1)  # of no dimensions CUDA would round it to a bfloat16 gradient's dtype
    if not (arrays.on_host(scale) and scale == 1):
        for g in held if factor is None else held[1:]:
            if g is not None:
                g.mul_(scale)
    return held


# ---------------------------------------------------------------------------------------------- the formula
def formula(problem: Problem, options: Options, stats: bool = False) -> tuple[Tensor, CrossEntropyStatistics | None]:
    """The loss and its statistics in PyTorch's operations, which hold all logits."""
    N, V, S = problem.sizes
    logits = F.linear(problem.x, problem.W, problem.b).view(N, V, S)
    return cross_entropy_formula.loss_and_statistics(logits, problem.target, problem.weight, options, stats)


def formula_gradients(upstream: Tensor, problem: Problem, options: Options, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of x, W, b and target, where needed, with a graph of their own."""
    return gradients_with_a_graph(lambda: formula(problem, options)[:1], problem[:4], (upstream,), needs)
