"""Cross entropy as operators of `torch.library`: see `_ops`."""

from __future__ import annotations

import torch

from . import _cross_entropy_formula, _ops
from ._autograd import accumulate_dtype
from ._cross_entropy_autograd import run, run_backward, target_gradient
from ._cross_entropy_formula import Options, class_axis, loss_shape

_OPTIONS = "str reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, bool zero_if_ignored"


def traced(logits, target, weight, options, numbers):
    """The loss and `numbers` of every row."""
    return FORWARD(logits, target, weight, numbers, *options)[:2]


def _run(logits, target, weight, numbers, *options):
    loss, stats, denominator, _ = run(logits, target, weight, Options(*options), numbers)
    return loss, stats, _present(denominator, stats)


def _run_backward(upstream, logits, target, weight, stats, denominator, *options):
    denominator = denominator if denominator.numel() else None
    return run_backward(upstream, logits, target, weight, stats, denominator, Options(*options))


def _present(denominator, stats):
    """An operator gives a tensor for every result."""
    return stats.new_empty(0) if denominator is None else denominator.view(1)


def _fake(logits, target, weight, numbers, *options):
    acc, reduction = accumulate_dtype(logits), options[0]
    rows = logits.shape[:1] if logits.dim() > 1 else (1,)
    S = 1
    for size in logits.shape[2:]:
        S = S * size
    loss = logits.new_empty(loss_shape(logits) if reduction == "none" else (), dtype=acc)
    stats = logits.new_empty((numbers, *rows, S), dtype=acc)
    return loss, stats, logits.new_empty(1 if reduction == "mean" else 0, dtype=acc)


def _fake_backward(upstream, logits, *_):
    return _ops.fake_output(logits, class_axis(logits))


class _TracedCrossEntropy(torch.autograd.Function):
    """The operators' autograd: as eagerly, with the operators in the place of what they run."""

    @staticmethod
    def forward(ctx, logits, target, weight, numbers, *options):
        loss, stats, denominator = _ops.below_autograd(FORWARD, logits, target, weight, numbers, *options)
        ctx.save_for_backward(logits, target, weight, stats, denominator)
        ctx.options = Options(*options)
        ctx.mark_non_differentiable(stats, denominator)
        ctx.set_materialize_grads(False)
        return loss, stats, denominator

    @staticmethod
    def backward(ctx, upstream, *_):
        logits, target, weight, stats, denominator = ctx.saved_tensors
        needs, rest = ctx.needs_input_grad[:2], (None,) * (2 + len(ctx.options))
        if upstream is None:
            return None, None, *rest
        if torch.is_grad_enabled():
            return *_cross_entropy_formula.gradients(upstream, logits, target, weight, ctx.options, needs), *rest
        dlogits = dtarget = None
        if needs[0]:
            dlogits = BACKWARD(upstream, logits, target, weight, stats, denominator, *ctx.options)
        if needs[1]:
            over = denominator if ctx.options.reduction == "mean" else None
            dtarget = target_gradient(upstream, logits, target, weight, stats, over, ctx.options)
        return dlogits, dtarget, *rest


FORWARD = _ops.define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, int numbers, {_OPTIONS}) "
    "-> (Tensor loss, Tensor stats, Tensor denominator)",
    _run,
    _fake,
    _TracedCrossEntropy.apply,
)
BACKWARD = _ops.define(
    "cross_entropy_backward(Tensor upstream, Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor denominator, "
    f"{_OPTIONS}) -> Tensor",
    _run_backward,
    _fake_backward,
)
