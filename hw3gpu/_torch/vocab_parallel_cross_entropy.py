"""Cross entropy of logits whose classes are divided over processes, in torch's autograd: docs/derivations.md, section 3.

Every process runs the forward kernel on its shard, for m_r = max z and s_r = Σ exp(z - m_r) - 1 of every row, and sends them
with what it has of the target (its logit, its weight) and of a smoothed target (Σ w_c (z_c - m_r)). All merge what all have
sent, in order of rank:

    m = max m_r,  s = Σ_r s_r exp(m_r - m) + Σ_{r ≠ r*} exp(m_r - m),   r* the first rank that has m
    loss = W log(1 + s) - q_t (z_t - m) - (ε/V) Σ_r (Σ w_c (z_c - m_r) + (m_r - m) Σ w_c) + ζ lse²
    q_t = (1 - ε) w_t,  W = q_t + (ε/V) Σ w_c,  lse = m + log(1 + s)

Backward is local. The backward kernel takes (m, s, W + 2 ζ lse) of the whole row in the place of the shard's own, and the
weights times V_r / V, so that its ε / V_r is the row's ε / V. What it writes at one class a row, the target or, where that is
another process's, class 0, is written again with the q_t that the row has here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import dispatch, outputs
from . import operators
from .autograd import accumulate_dtype, graph_is_needed, no_second_derivative
from .collectives import before, gathered

NO_CLASS = -100


class Options(NamedTuple):
    """What is the same for every row. start: the number of the shard's first class, -1 where the processes are to find out.

    traced: the call goes through the operators.
    """

    start: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    group: str
    traced: bool = False


def vocab_parallel_cross_entropy(
    shard: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, w_t, taken), (N, S) each: a row's loss, the weight of its target, and how many processes have its class."""
    if operators.traced(shard):
        return FORWARD(shard, target, weight, *options[:-1])[:3]
    if operators.transformed():
        raise RuntimeError("vocab_parallel_cross_entropy: torch.func transforms do not reach the other processes")
    if graph_is_needed(shard):
        return _VocabParallel.apply(shard, target, weight, options)
    return _run(shard, target, weight, options)[:3]


# ---------------------------------------------------------------------------------------------- forward
class _Row(NamedTuple):
    """Of every row, (N, S) each: its target in this shard (0 where that is elsewhere), whether it counts, and is here."""

    label: torch.Tensor
    counts: torch.Tensor
    here: torch.Tensor


def _run(
    shard: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """loss, w_t and taken; then what `_run_backward` needs: stats (m, s, W + 2 ζ lse, q_t here), target and weights."""
    start, ignore_index, label_smoothing, z_loss, softcap, group, _ = options
    z, acc = outputs.fold(shard, _class_axis(shard)), accumulate_dtype(shard)
    N, V, S = z.shape
    row = _place(target.reshape(N, S), V, before(V, group, z.device) if start < 0 else start, ignore_index)
    m, excess, inner = _own_sums(z, row, weight, label_smoothing, softcap, acc)
    weights = torch.full((), float(V), dtype=acc, device=z.device) if weight is None else weight.sum()
    z_t, w_t = (
        torch.where(row.here, v, 0) for v in (_logit_at(z, row.label, softcap, acc), _weight_at(weight, row.label, acc))
    )
    sent = torch.cat(
        [v.reshape(-1) for v in (m, excess, inner, z_t, w_t, row.here.to(acc), weights, torch.full_like(weights, V))]
    )
    received = gathered(sent, group)
    m_r, s_r, inner_r, *of_target = received[:, :-2].reshape(len(received), 6, N, S).unbind(1)
    weights_r, sizes = received[:, -2, None, None], received[:, -1]
    z_t, w_t, taken = (v.sum(0) for v in of_target)

    m, first = m_r.max(0)
    base = torch.where(m == -torch.inf, 0, m)
    scale_r = (m_r - base).exp()
    others = torch.where(torch.arange(len(m_r), device=m.device).view(-1, 1, 1) == first, 0, scale_r)
    s = (s_r * scale_r + others).sum(0)
    log_total = s.log1p()
    uniform = label_smoothing / sizes.sum()
    q_t, lse = (1 - label_smoothing) * w_t, m + log_total
    W = q_t + uniform * weights_r.sum(0)
    loss = W * log_total - torch.where(q_t == 0, 0, q_t * (z_t - base))
    if label_smoothing:
        below = torch.where(weights_r == 0, 0, (m_r - base) * weights_r)
        loss = loss - uniform * (inner_r + below).sum(0)
    if z_loss:
        loss, W = loss + z_loss * lse.square(), W + 2 * z_loss * lse
    known = row.counts & (taken == 1)
    loss = torch.where(row.counts, torch.where(known, loss, torch.nan), 0)
    W = torch.where(row.counts, torch.where(known, W, torch.nan), 0)
    stats = torch.stack([m, s, W, torch.where(row.here, q_t, 0)])
    scaled = None
    if label_smoothing:
        scaled = (torch.ones(V, dtype=acc, device=z.device) if weight is None else weight) * (V / sizes.sum())
    w_t, taken = torch.where(row.counts, w_t, 0), torch.where(row.counts, taken, 1)
    return loss, w_t, taken, stats, torch.where(row.counts, row.label, NO_CLASS), scaled


def _class_axis(shard: Tensor) -> int:
    return min(shard.dim() - 1, 1)


def _place(target: Tensor, V: int, start: int | Tensor, ignore_index: int) -> _Row:
    target = target.long()  # in fewer bits PyTorch wraps the number that it is compared with
    counts, local = target != ignore_index, target - start
    here = counts & (local >= 0) & (local < V)
    return _Row(torch.where(here, local, 0), counts, here)


def _own_sums(
    z: Tensor, row: _Row, weight: Tensor | None, label_smoothing: float, softcap: float | None, acc: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """m, Σ exp(z - m) - 1 and, with smoothing, Σ w_c (z_c - m) of this shard's part of every row."""
    N, V, S = z.shape
    if V == 0:
        m, excess, inner = (torch.full((N, S), v, dtype=acc, device=z.device) for v in (-torch.inf, -1.0, 0.0))
        return m, excess, inner
    which = dispatch.backend(z)
    see, device = dispatch.viewer(which), z.device
    loss, stats = torch.empty((N, S), dtype=acc, device=device), torch.empty((3, N, S), dtype=acc, device=device)
    invalid = torch.full((1,), N * S, dtype=torch.int64, device=device)
    some = torch.where(row.counts, 0, NO_CLASS)  # any class: its part of the loss is not asked for
    dispatch.cross_entropy(which).forward(
        see(z), see(some), see(weight), see(loss), see(stats), see(invalid), ignore_index=NO_CLASS,
        label_smoothing=1.0 if label_smoothing else 0.0, softcap=softcap,
    )  # fmt: skip
    # of a target that is smoothed out altogether the loss is W log Σ - Σ w_c (z_c - m) / V
    inner = V * (stats[2] * stats[1].log1p() - loss) if label_smoothing else torch.zeros_like(loss)
    nothing = stats[0] == -torch.inf  # no mass here; what its classes add to a smoothed loss is in m_r - m
    return stats[0], torch.where(nothing, -1.0, stats[1]), torch.where(nothing, 0.0, inner)


def _logit_at(z: Tensor, index: Tensor, softcap: float | None, acc: torch.dtype) -> Tensor:
    if z.shape[1] == 0:
        return torch.zeros(index.shape, dtype=acc, device=z.device)
    z_t = z.gather(1, index[:, None])[:, 0].to(acc)
    return z_t if softcap is None else softcap * (z_t / softcap).tanh()


def _weight_at(weight: Tensor | None, index: Tensor, acc: torch.dtype) -> Tensor:
    if weight is None or not len(weight):
        return torch.ones(index.shape, dtype=acc, device=index.device)
    return weight[index]


# ---------------------------------------------------------------------------------------------- backward
def _run_backward(
    upstream: Tensor, shard: Tensor, stats: Tensor, target: Tensor, scaled: Tensor | None, label_smoothing: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """The gradient of the shard, for the upstream gradient (N, S) of every row's loss."""
    which = dispatch.backend(shard)
    see, axis = dispatch.viewer(which), _class_axis(shard)
    dshard, dz = outputs.output(shard, axis, see)
    z = outputs.fold(shard, axis)
    V = z.shape[1]
    if not z.numel():
        return dshard
    upstream = upstream.to(stats.dtype)
    dispatch.cross_entropy(which).backward(
        see(z), see(target), see(scaled), see(stats[:3]), see(upstream), None, dz, ignore_index=NO_CLASS,
        label_smoothing=label_smoothing, softcap=softcap,
    )  # fmt: skip
    m, s, W, q_t = stats
    index = target.clamp(min=0)
    z_t = _logit_at(z, index, softcap, stats.dtype)
    below = z_t - torch.where(m == -torch.inf, 0, m)
    # without the difference p - 1, whose digits are lost where p -> 1
    at_target = torch.where(q_t == 0, W * below.exp() / (1 + s), (W - q_t) - W * ((s - below.expm1()) / (1 + s)))
    if scaled is not None:
        at_target = at_target - scaled[index] * (label_smoothing / V)
    if softcap is not None:
        at_target = at_target * (1 - (z_t / softcap).square())
    at_target = torch.where(target == NO_CLASS, 0, upstream * at_target)
    outputs.fold(dshard, axis).scatter_(1, index[:, None], at_target[:, None].to(dshard.dtype))
    return dshard


# ---------------------------------------------------------------------------------------------- autograd
class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor | None, ...]:
        found = (_below_autograd if options.traced else _run)(shard, target, weight, options)
        *_, stats, index, scaled = found
        ctx.save_for_backward(shard, stats, index, scaled if options.label_smoothing else None)
        ctx.options = options
        results = found if options.traced else found[:3]  # an operator gives all
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @no_second_derivative("vocab_parallel_cross_entropy")
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if upstream is None:
            return None, None, None, None
        (shard, stats, index, scaled), options = ctx.saved_tensors, ctx.options
        backward = BACKWARD if options.traced else _run_backward
        dshard = backward(upstream, shard, stats, index, scaled, options.label_smoothing, options.softcap)
        return dshard, None, None, None


# ---------------------------------------------------------------------------------------------- operators
def _below_autograd(shard: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Any:
    return operators.below_autograd(FORWARD, shard, target, weight, *options[:-1])


def _fake(
    shard: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    z = shard.flatten(2) if shard.dim() > 2 else shard.reshape(-1, shard.shape[-1], 1)
    N, V, S = z.shape
    loss, w_t, taken = (shard.new_empty((N, S), dtype=accumulate_dtype(shard)) for _ in range(3))
    index = shard.new_empty((N, S), dtype=torch.int64)
    return loss, w_t, taken, loss.new_empty((4, N, S)), index, loss.new_empty(V) if options.label_smoothing else None


FORWARD = operators.define(
    "vocab_parallel_cross_entropy(Tensor shard, Tensor target, Tensor? weight, int start, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, str group) -> "
    "(Tensor loss, Tensor w_t, Tensor taken, Tensor stats, Tensor index, Tensor scaled)",
    *(lambda *args, f=f: f(*args[:3], Options._make((*args[3:], True))) for f in (_run, _fake, _VocabParallel.apply)),
)
BACKWARD = operators.define(
    "vocab_parallel_cross_entropy_backward(Tensor upstream, Tensor shard, Tensor stats, Tensor index, Tensor? scaled, "
    "float label_smoothing, float? softcap) -> Tensor",
    _run_backward,
    lambda upstream, shard, *_: operators.fake_output(shard, _class_axis(shard)),
)
