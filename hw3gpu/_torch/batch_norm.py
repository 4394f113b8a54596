"""Batch normalisation in torch's autograd: docs/derivations.md, section 2.

A call takes one of three ways. Eager: `_BatchNorm`, or `run` alone where no graph is needed; what most calls are takes the same
way without views (`by_address`). Traced: the operators below, around the same functions. Inside `torch.func` transforms, in
forward mode, and where a gradient is to be differentiated again, the formula in PyTorch's own operations, which has derivatives
of every order (`batch_norm_formula`).

With "relu" on a GPU, `mask` keeps for each element whether it passed: a buffer of the kernels' own, one bit an element. For
every other activation the backward pass computes what went into it again, from x and the residual, which moves less; `beside`
stands for that residual, and for the result of a "relu" on the CPU. Where only some positions count (`counted`,
a bool each), the kernels take these as bits, and how many they are (`positions`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._core import arrays, dispatch, outputs
from .._core.arrays import Array
from .._core.torch_internals import apply_of
from . import batch_norm_formula, bound_launches, operators, small_calls
from .activation import ACTIVATIONS, kept, masked
from .autograd import accumulate_dtype, as_dtype, empty_of, graph_is_needed
from .batch_norm_formula import Gradients, Rest
from .bound_launches import Call
from .positions import Positions, packed
from .small_calls import Way


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest) -> Tensor:
    """y = x̂ γ + β, or a(… + residual); the arguments are checked."""
    if rest.call is None:
        if operators.traced(x):
            return _traced(x, weight, bias, residual, _for_kernels(rest))
        if operators.transformed():
            return (batch_norm_formula.exported if operators.exporting() else batch_norm_formula.formula)(
                x, weight, bias, residual, rest
            )
        rest = _for_kernels(rest)
    if graph_is_needed(x, weight, bias, residual):
        again = rest.call is not None and rest.call.launches is not None
        return (_apply_again if again else _BatchNorm.apply)(x, weight, bias, residual, rest)
    return run(x, weight, bias, residual, rest)[0]


def _for_kernels(rest: Rest) -> Rest:
    return rest if rest.counted is None else rest._replace(positions=packed(rest.counted), counted=None)


def call_of(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Any, running_var: Any, training: Any, momentum: Any,
    eps: Any, residual: Any, activation: Any,
) -> Call | None:  # fmt: skip
    """The `bound_launches.Call` of a call of `functional.batch_norm`; None where it is not kept."""
    if arrays.on_host(x) or not (type(training) is bool and type(momentum) is type(eps) is float):
        return None
    if activation is not None and (type(activation) is not str or activation not in ACTIVATIONS):
        return None
    for v in (running_mean, running_var):
        if getattr(v, "requires_grad", False):
            return None
    if residual is not None and getattr(residual, "dtype", None) is not x.dtype:  # under autocast
        return None
    return bound_launches.of(("batch norm", training, eps, activation), x, weight, bias, running_mean, running_var, residual)


def by_address(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, residual: Any, activation: Any,
) -> Tensor | None:  # fmt: skip
    """The result of an eager call that `small_calls` takes and whose arguments are right; None for any other."""
    if (
        not getattr(x, "is_cpu", False)
        or not operators.eager()
        or not (type(training) is bool and type(momentum) is type(eps) is float)
    ):
        return None
    if activation is not None and (type(activation) is not str or activation not in ACTIVATIONS):  # an array has no truth value
        return None
    if not (eps > 0 or (eps == 0 and not training)) or dispatch.requested_backend() == "gpu":
        return None
    way = small_calls.batch_norm_way(x, weight, bias, running_mean, running_var, training, residual)
    if way is None:
        return None
    if torch.is_grad_enabled():
        if running_mean is not None and running_var is not None and (running_mean.requires_grad or running_var.requires_grad):
            return None
        if graph_is_needed(x, weight, bias, residual):
            rest = way, running_mean, running_var, training, momentum, eps, activation
            return _apply_by_address(x, weight, bias, residual, rest)
    return small_calls.batch_norm_forward(
        way, x, weight, bias, running_mean, running_var, training, momentum, eps, residual, activation, False
    )[0]


# ---------------------------------------------------------------------------------------------- forward and backward
def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, and what `run_backward` needs: stats (mean, what its rounding left, rstd, var in training) and the mask."""
    running_mean, running_var, momentum, eps, activation, training, call, traced, _, positions = rest
    # kernels leave some bytes of a mask unwritten, and an operator's results are the same bits each time: there, these are 0
    new = torch.zeros if traced else torch.empty
    if call is not None and call.launches is not None:
        y, stats = torch.empty_like(x), new_statistics(x, rest)
        mask = new(mask_size(x), dtype=torch.uint8, device=x.device) if activation == "relu" else None
        call.launches(x, weight, bias, running_mean, running_var, residual, y, stats, mask, numbers=(momentum,))
        return y, stats, mask
    which = dispatch.backend(x)
    if which == "cpu" and positions is None:
        way = small_calls.batch_norm_way(x, weight, bias, running_mean, running_var, training, residual)
        if way:
            y, of_call = small_calls.batch_norm_forward(
                way, x, weight, bias, running_mean, running_var, training, momentum, eps, residual, activation
            )  # fmt: skip
            assert of_call is not None
            return y, of_call, None
    view, kernels = dispatch.kernel_view(which), dispatch.batch_norm(which)
    y, y_folded = outputs.output(x, 1, view)
    stats = new_statistics(x, rest)
    if not x.numel():
        return y, stats.zero_(), None
    folded, stats_view = outputs.folded(x, 1, which), view(stats)
    scale, shift = dispatch.vector_view(weight, which), dispatch.vector_view(bias, which)
    mask, fused = fused_operands(folded, residual, activation, x.device, which, new)
    if positions is not None:
        fused["valid"] = view(positions.bits)
        if training:
            fused["count"] = view(positions.n)
    running = (_dense(running_mean), _dense(running_var)) if training else (None, None)
    mean, rstd = parts(stats_view, which)
    with bound_launches.noted(call, (x, weight, bias, running_mean, running_var, residual, y, stats, mask), y):
        if training:
            kernels.forward(
                folded, scale, shift, y_folded, mean, stats_view[3], rstd, view(running[0]), view(running[1]),
                eps=eps, momentum=momentum, **fused,
            )  # fmt: skip
        else:
            kernels.normalize(folded, mean, rstd, scale, shift, y_folded, **fused)
    if training:
        for given, updated in zip((running_mean, running_var), running, strict=True):
            if given is not None and updated is not None and updated is not given:
                given.copy_(updated)
    return y, stats, mask


def new_statistics(x: Tensor, rest: Rest) -> Tensor:
    """stats: (4, C) to be written in training; in evaluation mean, 0 and rstd of the running statistics."""
    acc = accumulate_dtype(x)
    if rest.training:
        return empty_of(x, acc, 4, x.shape[1])
    assert rest.running_mean is not None
    assert rest.running_var is not None
    given = as_dtype(rest.running_mean, acc)
    return torch.stack((given, torch.zeros_like(given), (as_dtype(rest.running_var, acc) + rest.eps).rsqrt_()))


def parts(stats: Array, which: str) -> tuple[Array, Array]:
    """mean (2, C) and rstd of stats as the kernels see them; those on a GPU know where mean ends, and need no view of it."""
    return stats[:2] if which == "cpu" else stats, stats[2]


def fused_operands(
    folded: Array, residual: Tensor | None, activation: str | None, device: torch.device, which: str, new: Callable[..., Tensor]
) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask to be written, by `new`, or None; and what a launcher is given of residual, mask and activation."""
    mask, fused, view = None, dict[str, Any](), dispatch.kernel_view(which)
    if residual is not None:
        fused["residual"] = outputs.fold(view(residual), 1)
    if masked(which, activation):
        mask = new(dispatch.batch_norm(which).mask_size(folded), dtype=torch.uint8, device=device)
        fused["mask"] = view(mask)
    elif activation is not None:
        fused["activation"] = activation
    return mask, fused


def gate_operands(
    bias: Tensor | None, beside: Tensor | None, mask: Tensor | None, activation: str | None, which: str
) -> dict[str, Any]:
    """What a launcher of the backward pass is given to tell how much of dy passes."""
    if activation is None:
        return {}
    if masked(which, activation):
        return {"mask": dispatch.kernel_view(which)(mask)}
    residual = None if beside is None else outputs.folded(beside, 1, which)
    return {"activation": activation, "beta": dispatch.vector_view(bias, which), "residual": residual}


def _eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor,
    mask: Tensor | None, training: bool, activation: str | None, residual: bool, bits: Tensor | None = None,
    count: Tensor | None = None,
) -> Gradients:  # fmt: skip
    call = None
    if bits is None:
        call = bound_launches.of(
            ("batch norm, backward", training, activation, residual), x, dy, weight, bias, beside, stats, mask
        )  # fmt: skip
    return run_backward(dy, x, weight, bias, beside, stats, mask, training, activation, residual, bits, count, call)


def run_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor,
    mask: Tensor | None, training: bool, activation: str | None, residual: bool, bits: Tensor | None = None,
    count: Tensor | None = None, call: Call | None = None,
) -> Gradients:  # fmt: skip
    """dx, dgamma, dbeta in the accumulation dtype, and dresidual where `residual` asks for it; it is dy without an activation
    where every position counts (bits None)."""
    residual = residual and (activation is not None or bits is not None)
    if call is not None and call.launches is not None:
        C = x.shape[1]
        dx, dgamma, dbeta = torch.empty_like(x), stats.new_empty(C), stats.new_empty(C)
        written = torch.empty_like(x) if residual else None
        call.launches(x, dy, weight, bias, beside, stats, mask, dx, dgamma, dbeta, written)
        return dx, dgamma, dbeta, written
    which = dispatch.backend(x)
    if which == "cpu" and bits is None:
        found = small_calls.batch_norm_backward(dy, x, weight, bias, beside, stats, training, activation, residual)
        if found:
            return found
    view, kernels = dispatch.kernel_view(which), dispatch.batch_norm(which)
    dx, dx_folded = outputs.output(x, 1, view)
    C = x.shape[1]
    dgamma, dbeta = stats.new_empty(C), stats.new_empty(C)
    if not x.numel():
        return dx, dgamma.zero_(), dbeta.zero_(), torch.empty_like(x) if residual else None
    dresidual, fused = None, gate_operands(bias, beside, mask, activation, which)
    if bits is not None:
        fused["valid"] = view(bits)
        if training:
            fused["count"] = view(count)
    if residual:
        dresidual, fused["dresidual"] = outputs.output(x, 1, view)
    mean, rstd = parts(view(stats), which)
    with bound_launches.noted(call, (x, dy, weight, bias, beside, stats, mask, dx, dgamma, dbeta, dresidual), dx):
        (kernels.backward if training else kernels.inference_backward)(
            outputs.folded(dy, 1, which), outputs.folded(x, 1, which), mean, rstd, dispatch.vector_view(weight, which),
            dx_folded, view(dgamma), view(dbeta), **fused,
        )  # fmt: skip
    return dx, dgamma, dbeta, dresidual


def _dense(v: Tensor | None) -> Tensor | None:
    """A vector of channels with unit stride, which the kernels need."""
    return None if v is None else v.detach().contiguous() if not v.is_contiguous() else v


# ---------------------------------------------------------------------------------------------- autograd
class _BatchNorm(torch.autograd.Function):
    """A call by kernels, or by the operators around them under a compiler, which return all results."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest
    ) -> Tensor | tuple[Tensor | None, ...]:
        y, stats, mask = (_below_autograd if rest.traced else run)(x, weight, bias, residual, rest)
        told_by = kept(engine_of(x, rest.activation), rest.activation, bias, residual, y)
        ctx.save_for_backward(x, weight, *told_by, stats, mask, *(rest.positions or (None, None)))
        ctx.options = rest.training, rest.eps, rest.activation, rest.traced
        ctx.bias_dtype = None if bias is None else bias.dtype
        if not rest.traced:
            return y
        ctx.mark_non_differentiable(stats, mask)
        ctx.set_materialize_grads(False)
        return y, stats, mask

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, weight, bias, beside, stats, mask, bits, count = ctx.saved_tensors
        training, eps, activation, traced = ctx.options
        x_needs, weight_needs, bias_needs, residual_needs, _ = ctx.needs_input_grad
        backward = BACKWARD if traced else _eager_backward
        if torch.is_grad_enabled():  # somebody will differentiate again
            backward = batch_norm_formula.differentiable_backward(backward, eps)
        dx, dgamma, dbeta, dresidual = backward(
            dy, x, weight, bias, beside, stats, mask, training, activation, residual_needs, bits, count
        )
        return (
            dx if x_needs else None,
            as_dtype(dgamma, weight.dtype) if weight_needs else None,
            as_dtype(dbeta, ctx.bias_dtype) if bias_needs else None,
            (dy if activation is None and bits is None else dresidual) if residual_needs else None,
            None,
        )


_apply_again = apply_of(_BatchNorm)


class _ByAddress(torch.autograd.Function):
    """An eager call that `small_calls` takes: all its tensors are float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        rest: tuple[Way, Tensor | None, Tensor | None, bool, float, float, str | None],
    ) -> Tensor:  # fmt: skip
        way, running_mean, running_var, training, momentum, eps, activation = rest
        y, stats = small_calls.batch_norm_forward(
            way, x, weight, bias, running_mean, running_var, training, momentum, eps, residual, activation
        )  # fmt: skip
        if activation is None:
            ctx.save_for_backward(x, weight, stats)
        else:
            ctx.save_for_backward(x, weight, stats, *kept("cpu", activation, bias, residual, y))
        ctx.options = training, eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats, *told_by = ctx.saved_tensors
        bias, beside = told_by or (None, None)
        training, eps, activation = ctx.options
        x_needs, weight_needs, bias_needs, residual_needs, _ = ctx.needs_input_grad
        found: tuple[Tensor | None, ...] | None = None
        if torch.is_grad_enabled():  # somebody will differentiate again
            found = batch_norm_formula.differentiable_backward(run_backward, eps)(
                dy, x, weight, bias, beside, stats, None, training, activation, residual_needs
            )
        elif dispatch.requested_backend() != "gpu":
            found = small_calls.batch_norm_backward(dy, x, weight, bias, beside, stats, training, activation, residual_needs)
        dx, dgamma, dbeta, dresidual = found or run_backward(
            dy, x, weight, bias, beside, stats, None, training, activation, residual_needs
        )
        return (
            dx if x_needs else None,
            dgamma if weight_needs else None,
            dbeta if bias_needs else None,
            (dy if activation is None else dresidual) if residual_needs else None,
            None,
        )


_apply_by_address = apply_of(_ByAddress)


# ---------------------------------------------------------------------------------------------- operators
def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest
) -> tuple[Tensor, Tensor, Tensor | None]:
    stats = x.new_empty((4 if rest.training else 3, x.shape[1]), dtype=accumulate_dtype(x))
    mask = x.new_empty(mask_size(x), dtype=torch.uint8) if masked(engine_of(x, rest.activation), rest.activation) else None
    return operators.fake_output(x, 1), stats, mask


def engine_of(x: Tensor, activation: str | None) -> str:
    """The engine, where it decides whether a mask is kept; meta tensors have none that was asked for."""
    return dispatch.backend(x) if activation == "relu" else "cpu"


def mask_size(x: Tensor) -> int:
    """Bytes of the mask for x (N, C, …) on a GPU."""
    return dispatch.batch_norm(dispatch.backend(x)).mask_size(x)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor,
    mask: Tensor | None, training: bool, activation: str | None, residual: bool, bits: Tensor | None = None,
    count: Tensor | None = None,
) -> Gradients:  # fmt: skip
    dx, C = operators.fake_output(x, 1), x.shape[1]
    written = residual and (activation is not None or bits is not None)
    return dx, stats.new_empty(C), stats.new_empty(C), torch.empty_like(dx) if written else None


def _define(name: str, training: bool, running: str) -> Any:
    """The operator of training or of evaluation: a graph has to know which of them writes running statistics."""

    def rest(
        running_mean: Any,
        running_var: Any,
        momentum: float,
        eps: float,
        activation: str | None,
        bits: Any = None,
        count: Any = None,
    ) -> Rest:
        positions = None if bits is None else Positions(bits, count)
        return Rest(running_mean, running_var, momentum, eps, activation, training, traced=True, positions=positions)

    return operators.define(
        f"{name}(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, {running}, float momentum, float eps, "
        "str? activation, Tensor? bits=None, Tensor? count=None) -> (Tensor y, Tensor stats, Tensor mask)",
        *(lambda *args, f=f: f(*args[:4], rest(*args[4:])) for f in (run, _fake, _BatchNorm.apply)),
    )


TRAINING = _define("batch_norm_training", True, "Tensor(a!)? running_mean, Tensor(b!)? running_var")
EVALUATION = _define("batch_norm_evaluation", False, "Tensor running_mean, Tensor running_var")
BACKWARD = operators.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? beside, Tensor stats, Tensor mask, "
    "bool training, str? activation, bool residual, Tensor? bits=None, Tensor? count=None) "
    "-> (Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dresidual)",
    run_backward,
    _fake_backward,
)


def _operator(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest) -> tuple[Any, ...]:
    """The operator of a call, and its arguments."""
    return TRAINING if rest.training else EVALUATION, x, weight, bias, residual, *rest[:5], *(rest.positions or (None, None))


def _traced(*args: Any) -> Tensor:
    op, *given = _operator(*args)
    return op(*given)[0]


def _below_autograd(*args: Any) -> Any:
    return operators.below_autograd(*_operator(*args))
