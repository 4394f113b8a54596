"""Logits that are a product which is not computed yet: a cross entropy of them never holds all of them.

`LazyLogits` is a tensor without elements. It records what models do between their head and their loss: a scale, a tanh between
two scales, a dtype, a view of the rows. `torch.nn.functional.cross_entropy` of it is `linear_cross_entropy`. Any other
operation first computes the product and repeats the recorded steps, and then runs on the result.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .._core.torch_internals import tree_map, without_torch_function
from .._torch import arguments, operators
from .._torch.autograd import graph_is_needed

__all__ = ["LazyHead", "LazyLogits", "wrapped"]

_CROSS_ENTROPY = inspect.signature(F.cross_entropy)
_LEGACY = ("size_average", "reduce")


class Recorded(NamedTuple):
    """hidden (…, D), weight (V, D) and bias (V,) or None of the product, and the operations on it so far.

    The logits are outer · tanh(inner · product) where `outer` is given, else inner · product. Each factor is a pair, numerator
    and denominator. steps: the operations on each element in order, as functions of the tensor.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    inner: tuple[float, float] = (1.0, 1.0)
    outer: tuple[float, float] | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def then(self, step: Callable[[Tensor], Tensor], **changed: Any) -> Recorded:
        return self._replace(steps=(*self.steps, step), **changed)

    def scaled(self, step: Callable[[Tensor], Tensor], numerator: float, denominator: float) -> Recorded:
        a, b = self.inner if self.outer is None else self.outer
        factor = a * numerator, b * denominator
        return self.then(step, inner=factor) if self.outer is None else self.then(step, outer=factor)

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of these operands: the product, and every step."""
        z = F.linear(hidden, weight, bias)
        for step in self.steps:
            z = step(z)
        return z

    @property
    def extras(self) -> dict[str, Any] | None:
        """`logit_scale` and `softcap` of `linear_cross_entropy`; None where there are none such."""
        if self.outer is None:
            scale, cap = self.inner[0] / self.inner[1], None
        else:
            cap = self.outer[0] / self.outer[1]
            scale = (self.inner[0] * self.outer[0]) / (self.inner[1] * self.outer[1])
        if not all(v is None or arguments.LEAST_SCALE <= v <= arguments.MOST_SCALE for v in (scale, cap)):
            return None
        return {"logit_scale": scale, "softcap": cap}


class LazyLogits(Tensor):
    """Logits (…, V) that are computed when an operation needs their values: see the module."""

    recorded: Recorded | None
    computed: Tensor | None
    with_graph: bool
    of_hook: bool

    @staticmethod
    def __new__(cls, like: Any, recorded: Recorded | None, computed: Tensor | None, with_graph: bool) -> LazyLogits:
        shape, dtype, device = like
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.recorded, self.computed, self.with_graph, self.of_hook = recorded, computed, with_graph, recorded is None
        return self

    @staticmethod
    def of(recorded: Recorded) -> LazyLogits:
        """The logits that are recorded, with a graph where their operands ask for one."""
        operands = recorded.hidden, recorded.weight, recorded.bias
        like = (*recorded.hidden.shape[:-1], len(recorded.weight)), recorded.dtype, recorded.hidden.device
        if graph_is_needed(*operands):
            return _Recorded.apply(*operands, like, recorded)
        return LazyLogits(like, recorded, None, False)

    @staticmethod
    def of_computed(z: Tensor) -> LazyLogits:
        """Logits that are computed already; only their cross entropy is replaced by this library's."""
        return LazyLogits((z.shape, z.dtype, z.device), None, z, z.requires_grad)

    def compute(self) -> Tensor:
        """The logits as a plain tensor, with their graph."""
        if self.computed is None:
            of = self.recorded
            assert of is not None
            with torch.set_grad_enabled(self.with_graph):
                self.computed = of.product(of.hidden, of.weight, of.bias)
            self.recorded = None
        return self.computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with without_torch_function():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if func is F.cross_entropy and isinstance(first, LazyLogits):
            return _cross_entropy(first, _CROSS_ENTROPY.bind(*args, **kwargs))
        record = _RECORDED.get(func)
        if record is not None and isinstance(first, LazyLogits) and operators.eager():
            # without a graph where there was one it is no step of the model: the forward pass of someone's autograd function
            if first.recorded is not None and first.with_graph in (False, torch.is_grad_enabled()):
                found = record(first, first.recorded, *args[1:], **kwargs)
                if found is not None:
                    return found if isinstance(found, LazyLogits) else LazyLogits.of(found)
            if first.of_hook:
                return LazyLogits.of_computed(func(*_computed(args), **_computed(kwargs)))
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub has no func
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What comes past `__torch_function__` is below autograd, which has recorded it as an operation on `_Recorded`."""
        return func(*_computed(args), **_computed(kwargs or {}))


class _Recorded(torch.autograd.Function):
    """The graph of logits that are not computed, for what PyTorch differentiates by itself."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Any, recorded: Recorded) -> LazyLogits:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.product = recorded.product
        return LazyLogits(like, recorded, None, True)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        operands, again = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad():
            of = operands if again else [None if v is None else v.detach().requires_grad_() for v in operands]
            asked = [v for v, needed in zip(of, ctx.needs_input_grad[:3], strict=True) if needed]
            found = iter(torch.autograd.grad(ctx.product(*of), asked, upstream, create_graph=again))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None


def _computed(values: Any) -> Any:
    return tree_map(lambda v: v.compute() if isinstance(v, LazyLogits) else v, values)


# ---------------------------------------------------------------------------------------------- the loss
def _cross_entropy(logits: LazyLogits, given: inspect.BoundArguments) -> Tensor:
    options = _computed({k: v for k, v in given.arguments.items() if k != "input"})
    of, target = logits.recorded, options["target"]
    extras = None if of is None else of.extras
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if of is None or extras is None or logits.dim() not in (1, 2) or any(options.get(name) is not None for name in _LEGACY):
        return functional.cross_entropy(logits.compute(), **options)
    options = {k: v for k, v in options.items() if k not in _LEGACY and not (soft and k == "ignore_index")}
    return functional.linear_cross_entropy(of.hidden, of.weight, linear_bias=of.bias, loss_dtype=of.dtype, **extras, **options)


# ---------------------------------------------------------------------------------------------- what is recorded
def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 < value < math.inf


def _multiply(logits: LazyLogits, of: Recorded, other: Any) -> Recorded | None:
    return of.scaled(lambda z: z * other, other, 1.0) if _number(other) else None


def _divide(logits: LazyLogits, of: Recorded, other: Any) -> Recorded | None:
    return of.scaled(lambda z: z / other, 1.0, other) if _number(other) else None


def _tanh(logits: LazyLogits, of: Recorded) -> Recorded | None:
    return None if of.outer is not None else of.then(torch.tanh, outer=(1.0, 1.0))


def _float(logits: LazyLogits, of: Recorded) -> Recorded:
    return of.then(Tensor.float, dtype=torch.float32)


def _to(logits: LazyLogits, of: Recorded, *args: Any, **kwargs: Any) -> Recorded | LazyLogits | None:
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype) and args[0].is_floating_point:
        return of.then(lambda z: z.to(args[0]), dtype=args[0])
    if len(args) == 1 and not kwargs and torch.device(args[0]) == logits.device:
        return logits
    return None


def _contiguous(logits: LazyLogits, of: Recorded) -> LazyLogits:
    return logits


def _view(logits: LazyLogits, of: Recorded, *shape: Any) -> Recorded | None:
    if not all(type(n) is int for n in shape) and not (len(shape) == 1 and isinstance(shape[0], (tuple, list))):
        return None
    V, rows = of.weight.shape[0], logits.shape[:-1].numel()
    wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if not wanted or wanted[-1] not in (V, -1) or not all(type(n) is int for n in wanted):
        return None
    try:
        found = torch.empty((rows, V), device="meta").view(wanted).shape
    except RuntimeError:
        return None
    if found[-1] != V:
        return None
    return of._replace(hidden=of.hidden.reshape(*found[:-1], of.hidden.shape[-1]))


def _item(logits: LazyLogits, of: Recorded, index: Any) -> Recorded | None:
    """Slices of rows: `logits[..., :-1, :]`, `logits[:, -1, :]`."""
    index = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    if not all(i is Ellipsis or type(i) in (int, slice) for i in index) or index.count(Ellipsis) > 1:
        return None
    if (len(index) == logits.dim() or Ellipsis in index) and index[-1] not in (whole, Ellipsis):
        return None
    if len(index) - (Ellipsis in index) > logits.dim():
        return None
    return of._replace(hidden=of.hidden[index])


_RECORDED: dict[Any, Callable[..., Recorded | LazyLogits | None]] = {
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply, torch.mul, torch.multiply), _multiply),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, Tensor.true_divide, torch.div, torch.true_divide), _divide),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    Tensor.__getitem__: _item,
}

# What is answered from the shape, the dtype and the device, without a product.
_ATTRIBUTES = "shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_nested requires_grad grad_fn is_leaf"
_METADATA = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()}
_METADATA |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, torch.is_floating_point}
_METADATA |= {torch.numel, Tensor.__len__, Tensor.is_complex, torch.is_complex, Tensor.get_device, Tensor.element_size}


# ---------------------------------------------------------------------------------------------- heads
class LazyHead(torch.nn.Linear):
    """`torch.nn.Linear` whose result is `LazyLogits`, except under a tracer."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) -> (…, V)."""
        watched = self._forward_hooks or self._forward_pre_hooks  # they may take the weights away after the call
        if watched or not operators.eager() or type(self.weight) is not torch.nn.Parameter or type(input) is not Tensor:
            return super().forward(input)
        hidden, weight, bias = arguments.in_autocast(input, self.weight, self.bias)
        return LazyLogits.of(Recorded(hidden, weight, bias, hidden.dtype))


def wrapped(module: torch.nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: a head's result whose cross entropy is this library's."""
    return LazyLogits.of_computed(output) if type(output) is Tensor and operators.eager() else output
