"""Batch normalisation of (N, C, …): y = γ (x - μ) / √(σ² + ε) + β, each channel over its own values."""

import torch

from . import _views
from ._ops import add_op_namespace_prefix
from .gpu import batch_norm as kernels


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.batch_norm` of (N, C) or (N, C, …), in the input's dtype and layout.

    Training uses the statistics of the batch and updates the running ones in place, the variance by m/(m - 1). TypeError for
    kinds and dtypes, ValueError for shapes and values.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps)
    if not input.numel():
        return input.clone()
    if not training:
        acc = _views.accumulate_dtype(input)
        mean = running_mean.to(acc)
        stats = torch.stack((mean, torch.zeros_like(mean), (running_var.to(acc) + eps).rsqrt()))
        return _normalize(input, stats, weight, bias)
    y, stats = _training(input, weight, bias, float(eps))
    if running_mean is not None:
        m = input.numel() // input.shape[1]
        with torch.no_grad():
            running_mean.lerp_(stats[0].to(running_mean.dtype), momentum)
            running_var.lerp_((stats[3] * (m / (m - 1))).to(running_var.dtype), momentum)
    return y


def _check(input, running_mean, running_var, weight, bias, training, eps):
    _views.check("input", input)
    if input.dim() < 2:
        raise ValueError(f"input: expected (N, C, …), got {tuple(input.shape)}")
    C = input.shape[1]
    for name, v in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        if v is not None and (tuple(v.shape) != (C,) or v.device != input.device):
            raise ValueError(f"{name}: expected ({C},) on {input.device}, got {tuple(v.shape)} on {v.device}")
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        raise ValueError("running_mean and running_var: expected both, or in training neither")
    if training and input.numel() == C:
        raise ValueError(f"input: expected more than 1 value per channel in training, got {tuple(input.shape)}")
    if eps < 0 or (eps == 0 and training):
        raise ValueError(f"eps: expected more than 0, got {eps}")


def _vector(v):
    return None if v is None else v.detach().contiguous()


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_training"), mutates_args=())
def _training(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and stats (4, C): the mean, what its rounding left, 1/√(σ² + ε) and σ²."""
    y, stats = _views.output(x, 1), _statistics(x)
    with _views.on_device_of(x):
        kernels.forward(
            _views.fold(x, 1), _vector(weight), _vector(bias), _views.fold(y, 1), stats, stats[3], stats[2], None, None,
            eps=eps, momentum=0.0,
        )  # fmt: skip
    return y, stats


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_evaluation"), mutates_args=())
def _normalize(x: torch.Tensor, stats: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    y = _views.output(x, 1)
    with _views.on_device_of(x):
        kernels.normalize(_views.fold(x, 1), stats, stats[2], _vector(weight), _vector(bias), _views.fold(y, 1))
    return y


@torch.library.custom_op(add_op_namespace_prefix("batch_norm_backward"), mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, stats: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dgamma, dbeta = _views.output(x, 1), *_gradients_of_channels(x)
    backward = kernels.backward if training else kernels.inference_backward
    with _views.on_device_of(x):
        backward(
            _views.fold(dy, 1), _views.fold(x, 1), stats, stats[2], _vector(weight), _views.fold(dx, 1), dgamma, dbeta
        )  # fmt: skip
    return dx, dgamma, dbeta


def _statistics(x):
    return torch.empty((4, x.shape[1]), dtype=_views.accumulate_dtype(x), device=x.device)


def _gradients_of_channels(x):
    like = {"dtype": _views.accumulate_dtype(x), "device": x.device}
    return torch.empty(x.shape[1], **like), torch.empty(x.shape[1], **like)


@_training.register_fake
def _(x, weight, bias, eps):
    return _views.output(x, 1), _statistics(x)


@_normalize.register_fake
def _(x, stats, weight, bias):
    return _views.output(x, 1)


@_backward.register_fake
def _(dy, x, weight, stats, training):
    return _views.output(x, 1), *_gradients_of_channels(x)


def _setup_training(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, x, weight, bias, output[1], True)


def _setup_evaluation(ctx, inputs, output):
    x, stats, weight, bias = inputs
    _save(ctx, x, weight, bias, stats, False)


def _save(ctx, x, weight, bias, stats, training):
    ctx.save_for_backward(x, weight, stats)
    ctx.training, ctx.bias_dtype = training, None if bias is None else bias.dtype


def _gradients(ctx, dy):
    """Of x, weight and bias."""
    x, weight, stats = ctx.saved_tensors
    dx, dgamma, dbeta = _backward(dy, x, weight, stats, ctx.training)
    return (
        dx,
        None if weight is None else dgamma.to(weight.dtype),
        None if ctx.bias_dtype is None else dbeta.to(ctx.bias_dtype),
    )


def _gradient_training(ctx, dy, _):
    return *_gradients(ctx, dy), None


def _gradient_evaluation(ctx, dy):
    dx, dgamma, dbeta = _gradients(ctx, dy)
    return dx, None, dgamma, dbeta


_training.register_autograd(_gradient_training, setup_context=_setup_training)
_normalize.register_autograd(_gradient_evaluation, setup_context=_setup_evaluation)
