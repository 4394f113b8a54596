"""Softmax cross entropy of classes or probabilities; backward reads three numbers a row that forward has kept."""

import torch

from . import _views
from ._ops import add_op_namespace_prefix
from .gpu import cross_entropy as kernels


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of logits (C,), (N, C) or (N, C, …) as `torch.nn.functional.cross_entropy`, in the logits' dtype;
    under autocast that of halves is float32.

    target: int64 classes of the logits' shape without the class axis, or probabilities of the logits' shape and dtype. weight:
    (C,). A class out of range makes the loss and the gradient of its row NaN; nothing waits for the GPU to say so. Only the
    logits have a gradient. TypeError for kinds and dtypes, ValueError for shapes and values.
    """
    _check(input, target, weight, reduction, label_smoothing)
    if weight is not None:
        weight = weight.detach().to(_views.accumulate_dtype(input)).contiguous()
    loss, _, _ = _forward(input, target, weight, ignore_index, float(label_smoothing), reduction)
    return loss if _views.widened(input) else loss.to(input.dtype)


def _check(input, target, weight, reduction, label_smoothing):
    _views.check("input", input)
    if not input.dim() >= 1:
        raise ValueError("input: expected (C,), (N, C) or (N, C, …), got ()")
    soft = target.is_floating_point()
    if not soft and target.dtype is not torch.int64:
        raise TypeError(f"target: expected int64 classes or probabilities, got {target.dtype}")
    if soft and (target.dtype is not input.dtype or target.requires_grad):
        raise TypeError(f"target: expected probabilities in {input.dtype} that need no gradient, got {target.dtype}")
    expected = tuple(input.shape) if soft else _loss_shape(input)
    if tuple(target.shape) != expected or target.device != input.device:
        raise ValueError(f"target: expected {expected} on {input.device}, got {tuple(target.shape)} on {target.device}")
    C = input.shape[_axis(input)]
    if weight is not None and (tuple(weight.shape) != (C,) or weight.device != input.device):
        raise ValueError(f"weight: expected ({C},) on {input.device}, got {tuple(weight.shape)} on {weight.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")


def _axis(logits):
    return min(logits.dim() - 1, 1)


def _loss_shape(logits):
    return (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()


def _rows(logits, target):
    """Logits (N, V, S), and the target as (N, S) classes or (N, V, S) probabilities."""
    z = _views.fold(logits, _axis(logits))
    if target.is_floating_point():
        return z, _views.fold(target, _axis(logits))
    return z, target.reshape(z.shape[0], z.shape[2])


def _empty(logits, reduction):
    """Loss, the three numbers of every row, and the denominator of a mean: uninitialised."""
    like = {"dtype": _views.accumulate_dtype(logits), "device": logits.device}
    shape = _loss_shape(logits)
    N, S = (1, 1) if logits.dim() == 1 else (shape[0], torch.Size(shape[1:]).numel())
    loss = torch.empty(shape if reduction == "none" else (), **like)
    return loss, torch.empty((3, N, S), **like), torch.empty((), **like)


@torch.library.custom_op(add_op_namespace_prefix("cross_entropy"), mutates_args=())
def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, rows = _rows(logits, target)
    loss, stats, denominator = _empty(logits, reduction)
    apart = reduction == "none"
    of_rows = loss.view(stats.shape[1:]) if apart else torch.empty_like(stats[0])
    with _views.on_device_of(logits):
        kernels.forward(
            z, rows, weight, of_rows, stats, torch.empty(1, dtype=torch.int64, device=z.device),
            total=None if apart else loss, denominator=denominator if reduction == "mean" else None, mean=reduction == "mean",
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
    return loss, stats, denominator


@torch.library.custom_op(add_op_namespace_prefix("cross_entropy_backward"), mutates_args=())
def _backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    denominator: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> torch.Tensor:
    axis = _axis(logits)
    dlogits = _views.output(logits, axis)
    z, rows = _rows(logits, target)
    of_rows = stats.shape[1:]
    with _views.on_device_of(logits):
        kernels.backward(
            z, rows, weight, stats, upstream.reshape(of_rows) if reduction == "none" else upstream.expand(of_rows),
            denominator if reduction == "mean" else None, _views.fold(dlogits, axis),
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
    return dlogits


@_forward.register_fake
def _(logits, target, weight, ignore_index, label_smoothing, reduction):
    return _empty(logits, reduction)


@_backward.register_fake
def _(upstream, logits, *_):
    return _views.output(logits, _axis(logits))


def _setup(ctx, inputs, output):
    logits, target, weight, *ctx.options = inputs
    _, stats, denominator = output
    ctx.mark_non_differentiable(stats, denominator)
    ctx.save_for_backward(logits, target, weight, stats, denominator)


def _gradient(ctx, upstream, *_):
    return _backward(upstream, *ctx.saved_tensors, *ctx.options), *(None,) * 5


_forward.register_autograd(_gradient, setup_context=_setup)
