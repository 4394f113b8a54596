"""Cross entropy of rows whose classes are divided over processes: what a process sends, how all merge it, and its gradient.

Every process runs the forward kernel on its classes, for m_r = max z and s_r = Σ exp(z - m_r) - 1 of every row, and sends them
with what it has of the target (its logit, its weight) and of a smoothed target (Σ w_c (z_c - m_r)), and for the entropy
t_r = Σ exp(z - m_r) (m_r - z). All merge what all have sent, in order of rank (docs/derivations.md, section 3.5):

    m = max m_r,  s = Σ_r s_r exp(m_r - m) + Σ_{r ≠ r*} exp(m_r - m),   r* the first rank that has m
    loss = W log(1 + s) - q_t (z_t - m) - (ε/V) Σ_r (Σ w_c (z_c - m_r) + (m_r - m) Σ w_c) + ζ lse²
    q_t = (1 - ε) w_t,  W = q_t + (ε/V) Σ w_c,  lse = m + log(1 + s)
    entropy = log(1 + s) + Σ_r exp(m_r - m) ((m - m_r) (1 + s_r) + t_r) / (1 + s)

The gradient is local. The backward kernel takes (m, s, W + 2 ζ lse) of the whole row in the place of the classes' own, and the
weights times V_r / V, so that its ε / V_r is the row's ε / V. What it writes at one class a row, the target or, where that is
another process's, class 0, is written again with the q_t that the row has here. That of log-probability, entropy and lse is
`token_log_probs`', of the whole row's m, s and mean = Σ p (z - m) (section 3.12); where the target is elsewhere, class 0 is as
any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import dispatch
from . import cross_entropy_formula
from .autograd import accumulate_dtype
from .collectives import before
from .cross_entropy_formula import EXACT, NUMBERS, CrossEntropyStatistics, Options

NO_CLASS = -100
NUMBERS_OF_ROWS = NUMBERS + 1  # the arg max in two: that modulo 2^24, which float32 holds, and how many 2^24 are left


class Divided(NamedTuple):
    """What is the same for every row. start: the number of this process's first class, or a tensor of it.

    weight: (V_r,) in the kernels' dtype, or None. statistics: the entropy and the largest logit's class are merged too.
    differentiable: what their gradients need is kept.
    """

    start: Any
    weight: Tensor | None
    options: Options
    statistics: bool = False
    differentiable: bool = False


class Row(NamedTuple):
    """Of every row, (N, S) each: its target among the classes here, 0 where it is elsewhere; whether it counts, and is here."""

    label: Tensor
    counts: Tensor
    here: Tensor


class Merged(NamedTuple):
    """Of every row, (N, S) each unless said otherwise.

    loss, W, the weight of the target, how many processes have its class (1 where the row does not count); stats (4, N, S):
    m, s, W + 2 ζ lse, and q_t where the target is here, and where `differentiable` (6, N, S): mean, and 1 where it is here;
    scaled: weights · V_r / V, or None without smoothing; numbers: `NUMBERS_OF_ROWS` as `cross_entropy_formula.statistics`
    takes them, or None.
    """

    loss: Tensor
    W: Tensor
    w_t: Tensor
    taken: Tensor
    stats: Tensor
    scaled: Tensor | None
    numbers: Tensor | None


def first_class(start: int, V: int, group: Any, device: torch.device) -> Any:
    """The number of the first of the V classes here; -1: found by a collective of one number."""
    return before(V, group, device) if start < 0 else start


def rows_of(target: Tensor, V: int, of: Divided) -> Row:
    """Where the targets (N, S) are among the V classes here."""
    target = target.long()  # in fewer bits PyTorch wraps the number that it is compared with
    counts, local = target != of.options.ignore_index, target - of.start
    here = counts & (local >= 0) & (local < V)
    return Row(torch.where(here, local, 0), counts, here)


# ---------------------------------------------------------------------------------------------- forward
def to_send(z: Tensor, row: Row, of: Divided) -> Tensor:
    """What the other processes need of the logits (N, V_r, S): six numbers a row and two more; with statistics, eight and
    four."""
    acc, V = accumulate_dtype(z), z.shape[1]
    *numbers, z_t = _own_sums(z, row, of, acc)
    w_t = _weight_at(of.weight, row.label, acc)
    numbers[3:3] = [*(torch.where(row.here, v, 0) for v in (z_t, w_t)), row.here.to(acc)]
    weights = torch.full((), float(V), dtype=acc, device=z.device) if of.weight is None else of.weight.sum()
    of_all = [weights, torch.full_like(weights, V)]
    if of.statistics:
        start = torch.as_tensor(of.start, device=z.device)
        of_all += [(start % EXACT).to(acc), (start // EXACT).to(acc)]
    return torch.cat([v.reshape(-1) for v in (*numbers, *of_all)])


def _own_sums(z: Tensor, row: Row, of: Divided, acc: torch.dtype) -> list[Tensor]:
    """Of the classes here m, Σ exp(z - m) - 1, with smoothing Σ w_c (z_c - m), with statistics Σ exp(z - m) (m - z) and the
    first of them that has the largest logit; z_t."""
    N, V, S = z.shape
    if V == 0:
        nothing = (-torch.inf, -1.0, 0.0, *[0.0] * (2 * of.statistics), 0.0)
        return [torch.full((N, S), v, dtype=acc, device=z.device) for v in nothing]
    which, options = dispatch.backend(z), of.options
    view, device = dispatch.kernel_view(which), z.device
    loss = torch.empty((N, S), dtype=acc, device=device)
    stats = torch.empty((NUMBERS if of.statistics else 3, N, S), dtype=acc, device=device)
    invalid = torch.full((1,), N * S, dtype=torch.int64, device=device)
    # a target that is elsewhere is class 0: its part of the loss is not asked for
    dispatch.cross_entropy(which).forward(
        view(z), view(index_of(row)), view(of.weight), view(loss), view(stats), view(invalid), ignore_index=NO_CLASS,
        label_smoothing=1.0 if options.label_smoothing else 0.0, softcap=options.softcap, logit_scale=options.logit_scale,
    )  # fmt: skip
    m, s = stats[0], stats[1]
    # of a target that is smoothed out altogether the loss is W log Σ - Σ w_c (z_c - m) / V
    sums = [V * (stats[2] * s.log1p() - loss) if options.label_smoothing else torch.zeros_like(loss)]
    if of.statistics:
        sums += [(1 + s) * (stats[4] - s.log1p()), stats[5]]
    z_t = _logit_at(z, row.label, options, acc)
    if of.statistics and (options.softcap is not None or options.logit_scale != 1.0):
        z_t = m + stats[3]  # rounded as by the kernel: the largest logit is m
    empty = m == -torch.inf  # no mass here; what its classes add to a smoothed loss is in m_r - m
    return [m, torch.where(empty, -1.0, s), *(torch.where(empty, 0.0, v) for v in sums), z_t]


def merged(received: Tensor, row: Row, V: int, of: Divided) -> Merged:
    """The rows' losses, and what their gradients need, from what all processes have sent; V: the number of classes here."""
    shape, smoothing, z_loss = row.label.shape, of.options.label_smoothing, of.options.z_loss
    counts = 6 + 2 * of.statistics, 2 + 2 * of.statistics
    m_r, s_r, inner_r, *of_target = received[:, : -counts[1]].reshape(len(received), counts[0], *shape).unbind(1)
    weights_r, sizes, *starts = received[:, -counts[1] :].unbind(1)
    weights_r = weights_r[:, None, None]
    z_t, w_t, taken = (v.sum(0) for v in of_target[:3])

    m, first = m_r.max(0)
    base = torch.where(m == -torch.inf, 0, m)
    scale_r = (m_r - base).exp()
    others = torch.where(torch.arange(len(m_r), device=m.device).view(-1, 1, 1) == first, 0, scale_r)
    s = (s_r * scale_r + others).sum(0)
    log_total, below = s.log1p(), z_t - base
    uniform = smoothing / sizes.sum()
    q_t, lse = (1 - smoothing) * w_t, m + log_total
    W = whole = q_t + uniform * weights_r.sum(0)
    loss = W * log_total - torch.where(q_t == 0, 0, q_t * below)
    if smoothing:
        under = torch.where(weights_r == 0, 0, (m_r - base) * weights_r)
        loss = loss - uniform * (inner_r + under).sum(0)
    if z_loss:
        loss, W = loss + z_loss * lse.square(), W + 2 * z_loss * lse
    known = row.counts & (taken == 1)
    loss, W = (torch.where(row.counts, torch.where(known, v, torch.nan), 0) for v in (loss, W))
    scaled = None
    if smoothing:
        scaled = (W.new_ones(V) if of.weight is None else of.weight) * (V / sizes.sum())
    numbers, stats = None, [m, s, W, torch.where(row.here, q_t, 0)]
    if of.statistics:
        moved = torch.where(scale_r == 0, 0, scale_r * ((base - m_r) * (1 + s_r) + of_target[3]))
        spread = moved.sum(0) / (1 + s)
        numbers = torch.stack([m, s, W, below, log_total + spread])
        numbers = torch.where(row.counts, torch.where(known, numbers, torch.nan), 0)
        start = starts[0].long() + EXACT * starts[1].long()
        predicted = torch.where(m.isnan(), 0, of_target[4].gather(0, first[None])[0].long() + start[first])
        parts = torch.where(known, predicted % EXACT, -1), torch.where(known, predicted // EXACT, 0)
        numbers = torch.cat([numbers, torch.stack(parts).to(m.dtype)])
        if of.differentiable:
            stats += [torch.where(known, -spread, torch.nan), row.here.to(m.dtype)]
    w_t, taken = torch.where(row.counts, w_t, 0), torch.where(row.counts, taken, 1)
    return Merged(loss, whole, w_t, taken, torch.stack(stats), scaled, numbers)


def index_of(row: Row) -> Tensor:
    """The class at which `gradient` writes a second time, `NO_CLASS` in rows that do not count."""
    return torch.where(row.counts, row.label, NO_CLASS)


def with_gradients(numbers: Tensor | None, rows: Tensor) -> Tensor:
    """(3, N, S): log_prob, entropy and lse, which the gradients of statistics are those of; none of None. rows: (N, S)."""
    if numbers is None:
        return rows.new_empty(0, *rows.shape)
    m, s, _, below, entropy = numbers[:5]
    log_total = s.log1p()
    return torch.stack([below - log_total, entropy, m + log_total])


def statistics(numbers: Sequence[Tensor], target: Tensor, ignore_index: int) -> CrossEntropyStatistics:
    """Of every row, from its numbers and `with_gradients`, or none, as the losses give them."""
    of_rows, with_gradients = numbers
    # a class that no process has makes NaN of its row, or has raised
    found = cross_entropy_formula.statistics(of_rows, target.shape, 1 << 62, target, ignore_index)
    if len(with_gradients):
        log_prob, entropy, lse = with_gradients.reshape(3, *target.shape).unbind()
        found = found._replace(log_prob=log_prob, entropy=entropy, lse=lse)
    return found


def _logit_at(z: Tensor, index: Tensor, options: Options, acc: torch.dtype) -> Tensor:
    if z.shape[1] == 0:
        return torch.zeros(index.shape, dtype=acc, device=z.device)
    return _capped(z.gather(1, index[:, None])[:, 0].to(acc), options)


def _capped(z: Tensor, options: Options) -> Tensor:
    z = z * options.logit_scale
    return z if options.softcap is None else options.softcap * (z / options.softcap).tanh()


def _weight_at(weight: Tensor | None, index: Tensor, acc: torch.dtype) -> Tensor:
    if weight is None or not len(weight):
        return torch.ones(index.shape, dtype=acc, device=index.device)
    return weight[index]


def every_class_exists(taken: Tensor, target: Tensor, ignore_index: int) -> None:
    """IndexError for the first row whose target no process has; `taken`: how many have it. Waits for the device."""
    wrong = (taken.reshape(-1) != 1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise IndexError(
            f"target: expected classes of the vocabulary or ignore_index {ignore_index}, got {int(target.reshape(-1)[row])} "
            f"in row {row}"
        )


# ---------------------------------------------------------------------------------------------- backward
def gradient(
    upstream: Tensor, z: Tensor, dz: Tensor, stats: Tensor, index: Tensor, scaled: Tensor | None, options: Options,
    over: Tensor | None = None,
) -> None:  # fmt: skip
    """dz (N, V_r, S) of the classes here for the upstream gradient (N, S) of every row's loss, over `over`, (1,).

    dz may be z: each element is read before it is written, and what the kernel finds at the target's is written again.
    """
    if not z.numel():
        return
    which = dispatch.backend(z)
    view, upstream = dispatch.kernel_view(which), upstream.to(stats.dtype).contiguous()
    _, _, label_smoothing, _, softcap, _, logit_scale = options
    at = index.clamp(min=0)
    z_t = _logit_at(z, at, options, stats.dtype)
    dispatch.cross_entropy(which).backward(
        view(z), view(index), view(scaled), view(stats[:3].contiguous()), view(upstream), view(over), view(dz),
        ignore_index=NO_CLASS, label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    m, s, W, q_t = stats[:4]
    below = z_t - torch.where(m == -torch.inf, 0, m)
    # without the difference p - 1, whose digits are lost where p -> 1
    at_target = torch.where(q_t == 0, W * below.exp() / (1 + s), (W - q_t) - W * ((s - below.expm1()) / (1 + s)))
    if scaled is not None:
        at_target = at_target - scaled[at] * (label_smoothing / z.shape[1])
    if softcap is not None:
        at_target = at_target * (1 - (z_t / softcap).square())
    at_target = torch.where(index == NO_CLASS, 0, logit_scale * (upstream if over is None else upstream / over) * at_target)
    dz.scatter_(1, at[:, None], at_target[:, None].to(dz.dtype))


def gradient_with_statistics(
    upstream: Tensor | None, of_statistics: Tensor | None, z: Tensor, dz: Tensor, of_loss: Tensor | None, stats: Tensor,
    index: Tensor, scaled: Tensor | None, options: Options,
) -> None:  # fmt: skip
    """`gradient`, and that of `with_gradients` for of_statistics, (3, N, S); of one of them where the other is None.

    dz may be z where of_statistics is None. of_loss: the memory for the gradient of the loss where there are both, such as z,
    or None to allocate it.
    """
    if of_statistics is None:
        assert upstream is not None
        return gradient(upstream, z, dz, stats, index, scaled, options)
    _statistics_gradient(of_statistics, z, dz, stats, index, options)
    if upstream is not None:
        of_loss = torch.empty_like(z) if of_loss is None else of_loss
        gradient(upstream, z, of_loss, stats, index, scaled, options)
        dz += of_loss


def _statistics_gradient(upstream: Tensor, z: Tensor, dz: Tensor, stats: Tensor, index: Tensor, options: Options) -> None:
    """dz (N, V_r, S) of the classes here; a cap or a scale costs a copy of z and one of its gradient in the sums' precision."""
    if not z.numel():
        return
    which, (m, s, _, _, mean, here) = dispatch.backend(z), stats
    view, of_log_prob, plain = dispatch.kernel_view(which), torch.where(here == 1, upstream[0], 0), z
    g = of_log_prob, upstream[1].contiguous(), upstream[2] - (upstream[0] - of_log_prob)
    softcap, logit_scale = options.softcap, options.logit_scale
    dplain, changed = dz, softcap is not None or logit_scale != 1.0
    if changed:
        plain = _capped(z.to(stats.dtype), options)
        dplain = torch.empty_like(plain)
    dispatch.token_log_probs(which).backward(
        view(plain), view(index), view(torch.stack([m, s, mean])), view(g[0]), view(g[1]), view(g[2]), view(dplain),
        ignore_index=NO_CLASS, temperature=1.0,
    )  # fmt: skip
    if changed:
        dplain *= logit_scale if softcap is None else logit_scale * (1 - (plain / softcap).square())
        dz.copy_(dplain)
