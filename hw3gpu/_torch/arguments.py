"""Checks of the PyTorch functions' arguments, before anything is allocated or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import arrays, check
from . import dtensor, operators
from .activation import ACTIVATIONS
from .autograd import PLAIN, accumulate_dtype, as_dtype
from .cross_entropy_formula import EXACT, Options, loss_shape
from .linear_chunks import Problem
from .row_weights import RowWeights

REDUCTIONS = ("none", "mean", "sum")
GRADIENTS = ("auto", "forward", "backward")
ALL_IGNORED = ("nan", "zero")
LEAST_SCALE, MOST_SCALE = 1e-30, 1e30  # beyond, an inverse or a product is no float32
HALVES = (torch.float16, torch.bfloat16)
Operands = tuple[Tensor, Tensor, Tensor | None]  # x, W and b of x Wᵀ + b
FLOATING = {getattr(torch, name) for name in check.FLOATING}


def tensor(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}")
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise check.DtypeError(f"{name}: expected a dense tensor, got one of layout {layout}")


def floating_tensor(x: Tensor, name: str) -> None:
    tensor(x, name)
    if x.dtype not in FLOATING:
        check.floating(x, name)


def number(value: Any, name: str) -> float:
    """A real number as a float; as in PyTorch, also one in a tensor () that asks for no gradient."""
    if isinstance(value, Tensor) and value.dim() == 0 and not (value.requires_grad or value.is_meta):
        value = value.item()
    check.real_value(value, name)
    return float(value)


def scale(value: Any, name: str) -> float:
    """A number that logits or losses are multiplied or divided by, as a float."""
    if type(value) is not float:
        value = number(value, name)
    if not LEAST_SCALE <= value <= MOST_SCALE:
        raise ValueError(f"{name}: expected a number from 1e-30 to 1e30, got {value}")
    return value


def same_device(v: Tensor, name: str, x: Tensor, of: str) -> None:
    if v.device != x.device:
        raise RuntimeError(f"{name}: expected a tensor on {x.device}, where {of} is, got one on {v.device}")


def axis(dim: Any, x: Tensor, of: str) -> int:
    """`dim` counted from the front; IndexError unless `x` has that axis."""
    if type(dim) is not int:
        dim = check.integer_value(dim, "dim")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim: expected an axis of {of} with shape {check.shape_of(x)}, got {dim}")
    return dim % x.dim()


def autocast(x: Tensor) -> bool:
    """True inside autocast for the device of `x`."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


# ---------------------------------------------------------------------------------------------- batch normalisation
def batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, alone: bool = True,
) -> tuple[bool, float, float]:  # fmt: skip
    """Checks every argument: (whether only an input without an element may have these, momentum and eps as floats).

    `alone`: no other process has values of the batch.
    """
    floating_tensor(x, "input")
    dtensor.refuse(x, "input")
    beyond = x.dim() < 2
    if beyond and not (alone and x.dim() == 1 and not x.numel()):
        check.rank_at_least(x, "input", 2, "N, C, …")
    if type(training) is not bool:
        raise TypeError(f"training: expected a bool, got {training!r}")
    if type(eps) is not float or type(momentum) is not float:
        eps, momentum = number(eps, "eps"), number(momentum, "momentum")
    if not eps >= 0 or (training and eps == 0):
        raise ValueError(f"eps: expected a number {'above' if training else 'of at least'} 0, got {eps}")
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var: expected both or neither, got one")
    if not training and (running_mean is None or running_var is None):
        beyond = True
        if x.numel() or not alone:
            raise check.ShapeError("running_mean and running_var: expected both in evaluation (training=False), got None")
    vector, dtype, device = x.shape[1:2], x.dtype, x.device
    acc = accumulate_dtype(x)
    for name, v in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        if v is not None and not (
            type(v) in PLAIN
            and not v.is_nested
            and (v.dtype is acc or v.dtype is dtype)
            and v.shape == vector
            and v.device == device
            and v.layout is torch.strided
            and not (name.startswith("running") and (v.requires_grad or not v.is_contiguous()))
        ):
            beyond |= _of_channels(v, name, x, v.shape if x.dim() == 1 else vector, alone)
            if training and name.startswith("running") and v.numel() > 1 and v.stride(0) == 0:
                raise RuntimeError(f"{name}: expected a number of its own for each channel, to be updated, got one expanded")
    if training and alone and x.shape[0] == 1 and math.prod(x.shape[2:]) == 1:
        raise ValueError(f"input: expected more than 1 value per channel when training, got shape {check.shape_of(x)}")
    return beyond, momentum, eps


def _of_channels(v: Tensor, name: str, x: Tensor, vector: Sequence[int], alone: bool) -> bool:
    """Checks a vector of one number per channel of `x`. True where only an input without an element may have its dtype."""
    tensor(v, name)
    dtensor.refuse(v, name)
    beyond = v.dtype is not x.dtype and v.dtype is not accumulate_dtype(x)
    if beyond:
        allowed = dict.fromkeys(str(of).removeprefix("torch.") for of in (x.dtype, accumulate_dtype(x)))
        check.floating(v, name, check.FLOATING if alone and not x.numel() else tuple(allowed))
    if v.shape != vector:
        check.shape(v, name, tuple(vector), "one number per channel of input")
    same_device(v, name, x, "input")
    if v.requires_grad and name.startswith("running") and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: expected a tensor that asks for no gradient: there is none with respect to it")
    return beyond


def counted(x: Tensor, mask: Any, lengths: Any) -> Tensor | None:
    """The mask (N, …) of bool of the positions of input that count, from `mask` or `lengths`; None without both."""
    if mask is None and lengths is None:
        return None
    if mask is not None and lengths is not None:
        raise ValueError("mask and lengths: expected one of them, got both")
    positions = (*x.shape[:1], *x.shape[2:])
    if mask is not None:
        tensor(mask, "mask")
        if mask.dtype != torch.bool:
            raise check.DtypeError(f"mask: expected dtype bool, True where a value counts, {check.got_dtype(mask, 'mask')}")
        same_device(mask, "mask", x, "input")
        if mask.dim() > len(positions) or any(
            given not in (1, size) for given, size in zip(mask.shape[::-1], positions[::-1], strict=False)
        ):
            raise check.ShapeError(
                f"mask: expected shape {positions}, input's without its channels, or one that broadcasts to it, "
                f"got {check.shape_of(mask)}"
            )
        return mask.detach().expand(positions)
    tensor(lengths, "lengths")
    if check.dtype_name(lengths) not in check.INTEGER:
        raise check.DtypeError(
            f"lengths: expected an integer dtype ({', '.join(check.INTEGER)}), {check.got_dtype(lengths, 'lengths')}"
        )
    if x.dim() != 3:
        raise check.ShapeError(f"lengths: expected input of shape (N, C, L) beside it, got {check.shape_of(x)}; give mask")
    check.shape(lengths, "lengths", (x.shape[0],), "one length per sample of input")
    same_device(lengths, "lengths", x, "input")
    lengths = lengths.long()
    if arrays.on_host(lengths) and not operators.traced(lengths):
        wrong = ((lengths < 0) | (lengths > x.shape[2])).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(f"lengths: expected numbers from 0 to {x.shape[2]}, got {int(lengths[first])} for sample {first}")
    return torch.arange(x.shape[2], device=x.device) < lengths[:, None]


def activation_of(activation: Any) -> None:
    if activation is not None:
        check.one_of(activation, "activation", ACTIVATIONS)


def fused(x: Tensor, residual: Tensor | None, activation: Any) -> Tensor | None:
    """Checks `activation`; `residual` as the kernels take it."""
    activation_of(activation)
    if residual is None:
        return None
    tensor(residual, "residual")
    dtensor.refuse(residual, "residual")
    check.same_shape(residual, "residual", x, "input")
    same_device(residual, "residual", x, "input")
    if autocast(x):
        return as_dtype(residual, x.dtype)
    check.same_dtype(residual, "residual", x, "input")
    return residual


# ---------------------------------------------------------------------------------------------- cross entropy
def cross_entropy(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor | None:
    """Checks every argument that PyTorch's function has; the class weights in the kernels' dtype."""
    floating_tensor(z, "input")
    tensor(target, "target")
    if z.dim() == 0:
        raise check.ShapeError("input: expected (C,), (N, C) or (N, C, d1, …), got shape ()")
    C = z.shape[min(z.dim() - 1, 1)]
    if C == 0:
        raise ValueError(f"input: expected at least one class, got shape {check.shape_of(z)}")
    check.integer_value(ignore_index, "ignore_index")
    if target.is_floating_point():
        if ignore_index >= 0:
            raise check.ShapeError(f"ignore_index: expected none with probabilities as target, got {ignore_index}")
        check.floating(target, "target")
        check.same_shape(target, "target", z, "input")
    else:
        if target.dtype is not torch.int64:
            check.integer(target, "target")
        rows = loss_shape(z)
        if target.shape != rows:
            check.shape(target, "target", rows, "one class per row of input")
    same_device(target, "target", z, "input")
    weight = None if weight is None else class_weights(weight, C, z, "input", "class")
    check.one_of(reduction, "reduction", REDUCTIONS)
    if type(label_smoothing) is not float:
        check.real_value(label_smoothing, "label_smoothing")
    if not 0.0 <= label_smoothing <= 1.0:
        raise check.ShapeError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")
    return weight


def class_weights(weight: Tensor, classes: int, x: Tensor, of: str, one: str) -> Tensor:
    """The weights, one per `one`, in the kernels' dtype; checked."""
    floating_tensor(weight, "weight")
    check.shape(weight, "weight", (classes,), f"one weight per {one}")
    same_device(weight, "weight", x, of)
    return as_dtype(weight.detach(), accumulate_dtype(x)).contiguous()


def may_be_known(z: Any, target: Any, reduction: Any, gradient: Any, all_ignored: Any) -> bool:
    """True where an earlier call with these arguments may have been kept (`bound_launches`): tensors and known choices, on the
    host without a reduction."""
    if not (isinstance(z, Tensor) and isinstance(target, Tensor)):
        return False
    if not type(reduction) is type(gradient) is type(all_ignored) is str:  # to look for an array among strings raises
        return False
    if reduction != "none" and arrays.on_host(z):
        return False
    return reduction in REDUCTIONS and gradient in GRADIENTS and all_ignored in ALL_IGNORED


def extra(
    z_loss: float, softcap: float | None, logit_scale: float, gradient: str, all_ignored: str
) -> tuple[float, float | None, float]:
    """Checks the arguments that PyTorch's function does not have; z_loss, softcap and logit_scale as floats."""
    if type(z_loss) is not float:
        check.real_value(z_loss, "z_loss")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss}")
    if softcap is not None:
        softcap = scale(softcap, "softcap")
    check.one_of(gradient, "gradient", GRADIENTS)
    check.one_of(all_ignored, "all_ignored", ALL_IGNORED)
    return float(z_loss), softcap, scale(logit_scale, "logit_scale")


def statistics(return_stats: Any, differentiable: Any) -> None:
    """TypeError unless both are bools."""
    if not type(return_stats) is type(differentiable) is bool:
        check.boolean(return_stats, "return_stats")
        check.boolean(differentiable, "differentiable")


def differentiable(return_stats: bool) -> None:
    """Checks the arguments that `differentiable` needs."""
    if not return_stats:
        raise ValueError("differentiable: expected return_stats=True with it, for it is the statistics that get gradients")


def predictable(classes: int, x: Tensor, otherwise: str = "") -> None:
    """Checks that the statistic `predicted` is exact: the kernels count classes in the precision of the sums."""
    if classes > EXACT and accumulate_dtype(x) is torch.float32:
        raise ValueError(f"return_stats: expected at most {EXACT} classes, which float32 can count{otherwise}, got {classes}")


def row_weights(
    token_weight: Any, normalizer: Any, rows: tuple[int, ...], x: Tensor, zero_if_ignored: bool = False, of: str = "input"
) -> RowWeights | None:
    """Both, checked, in the precision of the sums; None where there is neither. `rows`: the shape of the loss of every row."""
    if token_weight is None and normalizer is None:
        return None
    if token_weight is not None:
        floating_tensor(token_weight, "token_weight")
        check.shape(token_weight, "token_weight", rows, f"one weight per row of {of}")
        same_device(token_weight, "token_weight", x, of)
        token_weight = as_dtype(token_weight, accumulate_dtype(x))
    if normalizer is not None:
        normalizer = _normalizer(normalizer, x, of)
        if zero_if_ignored:  # 0/∞ = 0 where 0/0 is NaN
            normalizer = torch.where(normalizer == 0, torch.inf, normalizer)
    return RowWeights(token_weight, normalizer)


def _normalizer(value: Any, x: Tensor, of: str) -> Tensor:
    """A tensor () on the device of `x`, in the precision of its sums."""
    acc = accumulate_dtype(x)
    if isinstance(value, Tensor):
        tensor(value, "normalizer")
        if value.is_complex() or value.dtype is torch.bool:
            raise check.DtypeError(f"normalizer: expected a tensor of real numbers, {check.got_dtype(value, 'normalizer')}")
        check.shape(value, "normalizer", (), "one number")
        if value.device.type != "cpu":
            same_device(value, "normalizer", x, of)
        return value.to(x.device, acc)
    return torch.full((), scale(value, "normalizer"), dtype=acc, device=x.device)


def gradient_of_rows(gradient: str, by: RowWeights, linear: bool = False) -> None:
    """Checks that `gradient` is possible with weights of rows."""
    if gradient == "forward" and by.token_weight is not None and (by.token_weight.requires_grad or not linear):
        which = "a token_weight that asks for a gradient" if linear else "token_weight"
        raise ValueError(f"gradient: expected 'auto' or 'backward' with {which}, got 'forward'")


def asked_dtype(dtype: Any) -> None:
    """Checks `loss_dtype`."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATING):
        raise TypeError(f"loss_dtype: expected None or one of {', '.join(check.FLOATING)}, got {dtype!r}")


def loss_dtype(x: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of the loss, as PyTorch's."""
    if x.dtype is torch.float32 and target.dtype is torch.int64:
        return x.dtype
    if x.dtype in HALVES and autocast(x):
        return torch.float32
    return torch.promote_types(x.dtype, target.dtype) if target.is_floating_point() else x.dtype


# ---------------------------------------------------------------------------------------------- token log-probabilities
def token_log_probs(z: Tensor, target: Tensor, temperature: float, ignore_index: int, dim: int) -> tuple[float, int, int]:
    """Checks every argument; the temperature as a float, ignore_index as an int, `dim` counted from the front."""
    floating_tensor(z, "logits")
    tensor(target, "target")
    check.rank_at_least(z, "logits", 1, "…, V")
    dim = axis(dim, z, "logits")
    if z.shape[dim] == 0:
        raise ValueError(f"logits: expected at least one class, got shape {check.shape_of(z)}")
    check.integer(target, "target")
    check.shape(target, "target", (*z.shape[:dim], *z.shape[dim + 1 :]), "one class per row of logits")
    same_device(target, "target", z, "logits")
    return scale(temperature, "temperature"), check.integer_value(ignore_index, "ignore_index"), dim


# ---------------------------------------------------------------------------------------------- of logits that are a product
def _beside(x: Tensor, W: Tensor, b: Tensor | None) -> None:
    """Checks dtype and device of what is multiplied with `x` and added, the bias, and that there is a class."""
    if W.shape[0] == 0:
        raise ValueError(f"linear_weight: expected at least one class, got shape {check.shape_of(W)}")
    like_input(x, W, b)


Names = tuple[str, str, str]  # of x, W and b in messages
_LINEAR = ("input", "linear_weight", "linear_bias")


def like_input(x: Tensor, W: Tensor, b: Tensor | None, names: Names = _LINEAR) -> None:
    """Checks dtype and device of W and b, and the shape of the latter."""
    of_x, of_W, of_b = names
    beside = [(of_W, W)]
    if b is not None:
        floating_tensor(b, of_b)
        check.shape(b, of_b, tuple(W.shape[:-1]), f"one number per row of {of_W}")
        beside.append((of_b, b))
    for name, v in beside:
        if not autocast(x):
            check.same_dtype(v, name, x, of_x)
        same_device(v, name, x, of_x)


def features(x: Tensor, W: Tensor, expected: str, names: Names = _LINEAR) -> None:
    """Checks that x (…, D) can be multiplied with W, a matrix of `expected` shape."""
    of_x, of_W, _ = names
    check.rank_at_least(x, of_x, 1, "…, D")
    if W.dim() != 2:
        raise check.ShapeError(f"{of_W}: expected {expected}, got shape {check.shape_of(W)}")
    check.shape(W, of_W, (W.shape[0], x.shape[-1]), f"last, the features of {of_x}")


def chunk_rows(rows: int | None) -> int | None:
    """The number of rows of a chunk as an int, checked; None for the library's own."""
    if rows is None:
        return None
    if check.integer_value(rows, "chunk_rows") < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {rows}")
    return check.integer_value(rows, "chunk_rows")


def linear_cross_entropy(
    x: Tensor, W: Tensor, target: Tensor, b: Tensor | None, weight: Tensor | None, asked: Options
) -> Tensor | None:
    """Checks every argument that PyTorch's function has; the class weights in the kernels' dtype."""
    floating_tensor(x, "input")
    floating_tensor(W, "linear_weight")
    if x.dim() == 0:
        raise check.ShapeError("input: expected (D,), (N, D) or (N, …, D), got shape ()")
    if W.dim() < 2:
        raise check.ShapeError(f"linear_weight: expected (C, D) or (C, d1, …, D), got shape {check.shape_of(W)}")
    if W.dim() > 2 and x.dim() != 2:
        raise check.ShapeError(f"input: expected (N, D) with linear_weight (C, d1, …, D), got shape {check.shape_of(x)}")
    check.shape(W, "linear_weight", (*W.shape[:-1], x.shape[-1]), "last, the features of input")
    _beside(x, W, b)
    logits = x.detach().new_empty(()).expand(*x.shape[:-1], *W.shape[:-1])
    if x.dim() > 2:  # rows (N, …) with the classes last, where PyTorch's function has them second
        logits = logits.movedim(-1, 1)
        if isinstance(target, Tensor) and target.is_floating_point():
            check.shape(target, "target", (*x.shape[:-1], len(W)), "the probabilities of each row of input")
            target = target.movedim(-1, 1)
    return cross_entropy(logits, target, weight, asked.ignore_index, asked.reduction, asked.label_smoothing)


def linear_token_log_probs(
    x: Tensor, W: Tensor, target: Tensor, b: Tensor | None, temperature: float, ignore_index: int
) -> tuple[float, int]:
    """Checks every argument but chunk_rows; the temperature as a float, ignore_index as an int."""
    floating_tensor(x, "input")
    floating_tensor(W, "linear_weight")
    tensor(target, "target")
    features(x, W, "(V, D)")
    check.integer(target, "target")
    check.shape(target, "target", tuple(x.shape[:-1]), "one class per row of input")
    _beside(x, W, b)
    logits = x.detach().new_empty(()).expand(*x.shape[:-1], len(W))
    return token_log_probs(logits, target, temperature, ignore_index, -1)[:2]


def in_autocast(x: Tensor, W: Tensor, b: Tensor | None) -> Operands:
    """The operands of a product in autocast's dtype where that is on, as PyTorch's `linear`."""
    if not autocast(x):
        return x, W, b
    of = torch.get_autocast_dtype(x.device.type)

    def cast(v: Tensor) -> Tensor:
        return v if v.dtype == torch.float64 else as_dtype(v, of)

    return cast(x), cast(W), None if b is None else cast(b)


def linear_problem(x: Tensor, W: Tensor, target: Tensor, b: Tensor | None, weight: Tensor | None) -> Problem:
    """The arguments as `Problem` has them, in autocast's dtype where that is on."""
    x, W, b = in_autocast(x, W, b)
    C, S, N = W.shape[0], math.prod(W.shape[1:-1]), math.prod(x.shape[:-1])
    return Problem(
        x.reshape(N, x.shape[-1]),
        W.reshape(C * S, W.shape[-1]),
        None if b is None else b.reshape(C * S),
        target.reshape((N, C, S) if target.is_floating_point() else (N, S)),
        weight,
    )
