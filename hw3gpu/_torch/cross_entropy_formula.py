"""Cross entropy: its options, the statistics of a row, and the formula in PyTorch's own operations, which have derivatives of
every order and work under every transform: docs/derivations.md, sections 3.3, 3.4 and 3.6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import outputs
from .autograd import accumulate_dtype, gradients_with_a_graph, no_derivative

NUMBERS = 6  # m, Σ exp(z - m) - 1, W, z_target - m, entropy, argmax; the first three are what the backward pass needs


EXACT = 1 << 24  # float32 holds the integers up to here


class Options(NamedTuple):
    """How the loss of a row is computed, and how the rows are reduced."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    zero_if_ignored: bool
    logit_scale: float = 1.0

    @property
    def of_rows(self) -> dict[str, Any]:
        """What the kernels take."""
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }


# The fields of `Options` as an operator's schema has them.
OPTIONS_SCHEMA = (
    "str reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, bool zero_if_ignored, "
    "float logit_scale"
)


class CrossEntropyStatistics(NamedTuple):
    """Of every row, from the pass that computed its loss, in float32 (float64 for float64).

    To differentiate one raises RuntimeError, unless they were asked for with `differentiable=True`; `.detach()` leaves the
    graph.

    The shape is that of the loss of every row. Rows that are ignored have zeros, are not `correct`, and are `predicted` -1.

    Attributes:
        lse: log Σ exp z, of the scaled and capped logits where `logit_scale` or `softcap` is given.
        log_prob: log p of the target class; None for probabilities.
        entropy: -Σ p log p.
        correct: True where no class has a larger logit than the target, which may tie with others; None for probabilities.
        predicted: the class of the largest logit, the first of several, int64. 0 in a row with a NaN. With
            `differentiable=True` what `torch.argmax` says.
    """

    lse: Tensor
    log_prob: Tensor | None
    entropy: Tensor
    correct: Tensor | None
    predicted: Tensor


def loss_shape(logits: Tensor) -> tuple[int, ...]:
    """The shape of the loss of every row: that of `logits` without the class axis."""
    return (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()


def class_axis(logits: Tensor) -> int:
    """0 for (C,), 1 for (N, C, …)."""
    return min(logits.ndim - 1, 1)


def statistics(
    numbers: Tensor, shape: tuple[int, ...], V: int, target: Tensor, ignore_index: int, predicted: Tensor | None = None
) -> CrossEntropyStatistics:
    """The statistics from the `NUMBERS` of every row, or from `vocab_parallel_rows.NUMBERS_OF_ROWS`.

    shape: that of the loss of every row. predicted: the arg max, where the numbers do not hold it.
    """
    m, excess, _, below, entropy, argmax, *above = numbers.reshape(len(numbers), *shape).unbind()
    log_total = excess.log1p()
    if predicted is None:
        predicted = argmax.long() + EXACT * above[0].long() if above else argmax.long()
    if target.is_floating_point():
        return CrossEntropyStatistics(m + log_total, None, entropy, None, predicted)
    target = target.long()  # in fewer bits PyTorch wraps the numbers that it is compared with
    known = (target != ignore_index) & (target >= 0) & (target < V)
    correct, predicted = (below == 0) & known, torch.where(known, predicted, -1)
    return CrossEntropyStatistics(m + log_total, below - log_total, entropy, correct, predicted)


def exact_argmax(logits: Tensor, numbers: Tensor) -> Tensor | None:
    """The arg max by one more read of the logits where the kernels' numbers cannot hold it, else None."""
    axis = class_axis(logits)
    inexact = logits.shape[axis] > EXACT and numbers.dtype == torch.float32
    return logits.detach().argmax(axis) if inexact else None


def without_derivatives(statistics: CrossEntropyStatistics, *depends_on: Tensor | None) -> CrossEntropyStatistics:
    """Statistics whose differentiation raises an error."""
    tied_to = [t for t in depends_on if t is not None and t.requires_grad]
    message = "statistics of cross entropy: they have a gradient where differentiable=True asks for it"
    return statistics._replace(**{
        name: no_derivative(message, v, *tied_to, copied=True)
        for name, v in statistics._asdict().items() if v is not None and v.is_floating_point()
    })  # fmt: skip


def loss_and_statistics(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, stats: bool
) -> tuple[Tensor, CrossEntropyStatistics | None]:
    """The loss, and the statistics, or None; both with derivatives."""
    z = _capped(logits, options)
    loss, log_p = _loss(z, target, weight, options)
    if not stats:
        return loss, None
    axis = class_axis(logits)
    predicted = z.detach().argmax(axis)
    lse, entropy = torch.logsumexp(z, axis), entropy_of(log_p, axis)
    if target.is_floating_point():
        return loss, CrossEntropyStatistics(lse, None, entropy, None, predicted)
    target = target.long()
    kept = target != options.ignore_index
    at = torch.where(kept, target, 0).unsqueeze(axis)
    log_prob = log_p.gather(axis, at).squeeze(axis)
    correct = z.gather(axis, at).squeeze(axis) == z.amax(axis)
    lse, log_prob, entropy = (torch.where(kept, v, 0.0) for v in (lse, log_prob, entropy))
    return loss, CrossEntropyStatistics(lse, log_prob, entropy, kept & correct, torch.where(kept, predicted, -1))


def entropy_of(log_p: Tensor, axis: int) -> Tensor:
    """-Σ p log p; a class without probability adds nothing, nor to the gradient."""
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(axis)


def gradients(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of logits and target, where needed, with a graph of their own."""

    def loss() -> tuple[Tensor]:
        return (_loss(_capped(logits, options), target, weight, options)[0],)

    return gradients_with_a_graph(loss, (logits, target), (upstream,), needs)


def never_zero(denominator: Tensor, options: Options) -> Tensor:
    """A denominator of 0 makes a loss of 0/0; where `zero_if_ignored`, it is replaced by infinity, and the loss is 0."""
    return denominator.masked_fill_(denominator == 0, torch.inf) if options.zero_if_ignored else denominator


def upstream_of_rows(upstream: Tensor, numbers: Tensor, options: Options) -> Tensor:
    """∂ℓ/∂loss of every row, (N, S)."""
    rows = numbers.shape[1:]
    return upstream.reshape(rows) if options.reduction == "none" else upstream.expand(rows)


def target_gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, numbers: Tensor, denominator: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """∂loss/∂y_c = -w_c (1 - ε) log p_c for probabilities."""
    acc = numbers.dtype
    z = outputs.fold(logits, class_axis(logits)).to(acc)
    if options.logit_scale != 1.0:
        z = options.logit_scale * z
    if options.softcap is not None:
        z = options.softcap * (z / options.softcap).tanh()
    log_p = (z - numbers[0][:, None]) - numbers[1].log1p()[:, None]
    scale = upstream_of_rows(upstream, numbers, options).to(acc)[:, None] * (options.label_smoothing - 1)
    if denominator is not None:
        scale = scale / denominator
    if weight is not None:
        scale = scale * weight.to(acc)[None, :, None]
    return (scale * log_p).reshape(target.shape).to(target.dtype)


def _capped(logits: Tensor, options: Options) -> Tensor:
    z = logits.to(accumulate_dtype(logits))
    if options.logit_scale != 1.0:
        z = options.logit_scale * z
    return z if options.softcap is None else options.softcap * (z / options.softcap).tanh()


def _loss(z: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """The reduced loss of capped logits, and log p."""
    axis = class_axis(z)
    soft = target.is_floating_point()
    log_p = F.log_softmax(z, axis)
    target = target.to(z.dtype) if soft else target.long()
    smoothing = options.label_smoothing
    if soft and smoothing:
        target = (1 - smoothing) * target + smoothing / z.shape[axis]
    loss = F.cross_entropy(z, target, weight, reduction="none", ignore_index=options.ignore_index)
    kept = torch.ones((), dtype=torch.bool, device=z.device) if soft else target != options.ignore_index
    if smoothing and not soft:  # spelt out: ONNX has no such argument, and one of its exporters drops it
        each = log_p if weight is None else log_p * weight.to(z.dtype).view(-1, *(1,) * (z.dim() - axis - 1))
        loss = (1 - smoothing) * loss - torch.where(kept, each.mean(axis), 0.0) * smoothing
    if options.z_loss:
        loss = loss + torch.where(kept, options.z_loss * torch.logsumexp(z, axis) ** 2, 0.0)
    return reduced(loss, kept, target, weight, options), log_p


def multiplied(loss: Tensor, factor: Tensor) -> Tensor:
    """The losses of all rows times a number each, 0 · ∞ = 0."""
    return factor * torch.where((factor == 0) & loss.isinf(), 0.0, loss)


def counts(kept: Tensor, target: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """What each row counts in the divisor of a mean, in the dtype of `like`."""
    if target.is_floating_point():
        return torch.ones_like(like)
    if weight is None:
        return kept.to(like.dtype)
    # a class out of range is told of where the rows are read
    classes = torch.where(kept, target, 0).clamp(0, weight.shape[0] - 1)
    return torch.where(kept, weight[classes], 0.0)


def reduced(
    loss: Tensor, kept: Tensor, target: Tensor, weight: Tensor | None, options: Options, token_weight: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reduction of the losses of all rows; `kept`: those that are not ignored. token_weight: of their shape; counted: what
    each adds to the divisor of a mean of classes, where that is known."""
    if token_weight is not None:
        loss = multiplied(loss, token_weight)
    if options.reduction == "none":
        return loss
    if options.reduction == "sum":
        return loss.sum()
    if counted is None:
        if target.is_floating_point() and token_weight is None:
            return loss.sum() / loss.numel()
        counted = counts(kept, target, weight, loss)
    denominator = (counted if token_weight is None else token_weight * counted).sum()
    if options.zero_if_ignored:
        denominator = torch.where(denominator == 0, torch.inf, denominator)
    return loss.sum() / denominator
