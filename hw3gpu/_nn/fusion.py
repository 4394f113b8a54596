"""Batch normalisation and the activation behind it in one pass, in models that have two modules: found by tracing (`torch.fx`).

A module in whose `forward` BN -> activation or BN -> add -> activation is found gets a subclass of its class, whose `forward`
is what was traced, with one call (`norm_act`) in the place of the two or three. All else stays: the modules and their names,
what other methods of the class do, and isinstance. What was traced holds for tensors as arguments, and until an attribute is
set that `forward` may have read; beyond that the module's own `forward` runs.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.proxy import TraceError

from .._core.torch_internals import ConvNd
from .._torch.activation import applied
from .batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNorm,
    SyncBatchNormAct,
)
from .frozen import OfOthers
from .tools import Unscripted
from .torch_modules import activation_of

__all__ = ["Fused", "fuse", "norm_act"]

NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)
_FUNCTIONS = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.silu: "silu", F.hardswish: "hardswish", F.gelu: "gelu",
}  # fmt: skip
_ADDS = {operator.add, torch.add, "add"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
# what has its activation already; of a class of timm's `BatchNormAct2d` too
_DONE = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct, OfOthers)
_NEW_RESULT = (ConvNd, torch.nn.Linear)
_log = logging.getLogger("hw3gpu.nn")


def norm_act(norm: Any, x: Any, activation: str, residual: Any = None) -> Any:
    """activation(norm(x) + residual): in one pass where `norm` is ours and has no hooks, and the residual has x's shape and
    dtype."""
    alike = residual is None or (isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype)
    if type(norm) in NORMS and isinstance(x, Tensor) and alike and not _watched(norm):
        return norm._forward(x, norm.eps, residual=residual, activation=activation)
    y = norm(x)
    return applied(y if residual is None else y + residual, activation)


def _watched(module: Any) -> bool:
    """True where a module has hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def fuse(model: torch.nn.Module) -> None:
    """Fuses what it finds in every module of `model`; warns of what cannot be traced, and where there is nothing."""
    refused, count = [], 0
    for name, module in model.named_modules():
        if not isinstance(module, (*NORMS, Fused)) and any(type(one) in NORMS for one in _directly_in(module)):
            found, why = _fused(module)
            count += len(found)
            if found:
                _log.info("%s: fused with the activation behind them: %s", name or "(the module)", ", ".join(found))
            if why:
                refused.append(f"{name or '(the module)'} ({type(module).__name__}): {why}")
    if refused:
        warnings.warn(f"convert_batch_norm: torch.fx cannot trace, so not fused: {'; '.join(refused)}", stacklevel=3)
    elif not count and not any(isinstance(module, (Fused, *_DONE)) for module in model.modules()):
        warnings.warn("convert_batch_norm: fuse=True found no batch normalisation with an activation behind it", stacklevel=3)


def _directly_in(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The children of a module, and theirs where these are lists of modules."""
    for child in module._modules.values():
        if child is not None:
            yield child
            if type(child) in _LISTS:
                yield from _directly_in(child)


def _fused(module: torch.nn.Module) -> tuple[list[str], str]:
    """What was fused in one module, each by its name, and why nothing was."""
    base = type(module)
    if base in _LISTS:
        return [], ""
    if isinstance(module, GraphModule):
        return [], "a graph already: convert the model before it is traced"
    if base.forward is torch.nn.Sequential.forward:
        found = [f"{a}" for (a, norm), (_, act) in _neighbours(module) if type(norm) in NORMS and _activation_module(act)]
        if found:
            module.__class__ = _subclass(base, _FusedSequential)
        return found, ""
    try:
        forwards, found = _traced_forwards(module)
    except Exception as error:  # of whatever the model's code does with proxies
        return [], f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if found:
        read = frozenset(name for name in module.__dict__ if not name.startswith("_") and name != "training")
        module.__class__ = _new_class(base, _FusedForward, forwards=forwards, read=read)
    return found, ""


# ---------------------------------------------------------------------------------------------- the classes
class Fused(Unscripted):
    """A module whose `forward` calls batch normalisations and their activations at once; `base` is the class that it had."""

    base: type[torch.nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.base,), self.__dict__


class _FusedForward(Fused):
    """Of a forward that was traced, in training and in evaluation."""

    forwards: tuple[Callable[..., Any], Callable[..., Any], int]
    read: frozenset[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        training, evaluation, number = self.forwards
        if kwargs or len(args) != number or not all(isinstance(arg, Tensor) for arg in args):
            return self.base.forward(self, *args, **kwargs)
        return training(self, *args) if self.training else evaluation(self, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        base, read = self.base, self.read
        super().__setattr__(name, value)
        if name in read:
            self.__class__ = base  # type: ignore[assignment]
            _log.info("%s: fused no more: its attribute %s was set", base.__name__, name)


class _FusedSequential(Fused):
    """For `torch.nn.Sequential`: fuses modules that are neighbours when it is called."""

    def forward(self, input: Any) -> Any:
        waiting = None
        for module in self._modules.values():
            if waiting is not None:
                activation = _activation_module(module)
                input = norm_act(waiting, input, activation) if activation else waiting(input)
                waiting = None
                if activation:
                    continue
            if type(module) in NORMS and isinstance(input, Tensor):
                waiting = module
            else:
                input = module(input)  # type: ignore[misc]
        return input if waiting is None else waiting(input)


class _Blank(torch.nn.Module):
    """What a copy or a pickle begins with: with its state it becomes `base`, and is fused anew."""

    base: type[torch.nn.Module]

    def __setstate__(self, state: Any) -> None:
        self.__class__ = self.base  # type: ignore[assignment]
        self.__setstate__(state)
        _fused(self)


def _new_class(base: Any, kind: Any, **body: Any) -> Any:
    return type(f"Fused{base.__name__}", (kind, base), {"base": base, "__module__": "hw3gpu.nn", **body})


_subclass: Any = functools.cache(_new_class)  # a class is a key too, which mypy does not see


def _blank(base: type[torch.nn.Module]) -> torch.nn.Module:
    of = _subclass(base, _Blank)
    return of.__new__(of)


# ---------------------------------------------------------------------------------------------- tracing
class _Argument(Proxy):
    """A proxy that answers `isinstance` for arguments, which are tensors, and raises for values whose type is unknown."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        asking: Any = sys._getframe(1)
        while asking.f_globals.get("__name__") in ("abc", "typing"):
            asking = asking.f_back
        if asking.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return _Argument
        if self.node.op == "placeholder":
            return Tensor
        raise TraceError("forward asks for the type of what it has computed")


class _Tracer(Tracer):
    """Of one module's own forward: its children are leaves."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _Argument(node, self)


def _traced_forwards(module: torch.nn.Module) -> tuple[tuple[Any, Any, int], list[str]]:
    """The fused forward of training, that of evaluation and their number of arguments; and what was fused in them."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
        raise TraceError("forward has arguments that may be left out")
    if "forward" in module.__dict__:
        raise TraceError("its forward was replaced")
    before, training = dict(module.__dict__), module.training
    forwards: list[Any] = []
    names: list[str] = []
    try:
        for module.training in (True, False):
            graph = _Tracer().trace(module)
            names = [*names, *(name for name in _rewritten(graph, module) if name not in names)]
            forwards.append(_compiled(graph, type(module).__name__))
    finally:
        module.training = training
    if any(before.get(name, before) is not value for name, value in module.__dict__.items() if name != "training"):
        module.__dict__.clear()
        module.__dict__.update(before)
        raise TraceError("forward changes attributes")
    return (*forwards, len(parameters)), names


def _compiled(graph: Graph, name: str) -> Any:
    """The graph as a Python function of the module and its arguments."""
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<{name}, fused>", "exec"), scope)
    return scope["forward"]


# ---------------------------------------------------------------------------------------------- rewriting
def _rewritten(graph: Graph, module: torch.nn.Module) -> list[str]:
    """Puts `norm_act` in the place of what it does, and names the batch normalisations."""
    names = []
    for act in list(graph.nodes):
        activation = _activation(act, module)
        found = _pattern(act.args[0], module) if activation else None
        if found is None or not _may_move(found[0], act, module):
            continue
        norm, residual = found
        with graph.inserting_before(act):
            owner = graph.create_node("get_attr", norm.target)
            operands = (owner, norm.args[0], activation) if residual is None else (owner, norm.args[0], activation, residual)
            act.replace_all_uses_with(graph.call_function(norm_act, operands))
        for node in dict.fromkeys((act, act.args[0], norm)):
            graph.erase_node(node)
        names.append(str(norm.target) if residual is None else f"{norm.target} with a residual")
    return names


def _pattern(node: Any, module: torch.nn.Module) -> tuple[Any, Any] | None:
    """The batch normalisation, and what is added to it, in what an activation is given; each used nowhere else."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    if _is_norm(node, module):
        return node, None
    plain, in_place = node.target in _ADDS, node.target in _ADDS_IN_PLACE
    if not (plain or in_place) or node.kwargs or len(node.args) != 2:
        return None
    orders: Any = (node.args, node.args[::-1])
    for norm, residual in orders:
        if in_place and norm is not node.args[0]:  # which would write into the residual
            continue
        if isinstance(residual, Node) and norm is not residual and _is_norm(norm, module) and len(norm.users) == 1:
            return norm, residual
    return None


def _may_move(norm: Any, act: Any, module: torch.nn.Module) -> bool:
    """True where nothing between the two may write to what the batch normalisation reads."""
    x = norm.args[0]
    near = {x, *x.users} - {norm}
    if x.op != "call_module" or not isinstance(module.get_submodule(str(x.target)), _NEW_RESULT):
        near.update(x.all_input_nodes)  # of which x may be a view
    node = norm.next
    while node is not act:
        if node is not act.args[0] and not near.isdisjoint({node, *node.all_input_nodes}):
            return False
        node = node.next
    return True


def _is_norm(node: Any, module: torch.nn.Module) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "call_module"
        and type(module.get_submodule(str(node.target))) in NORMS
        and len(node.args) == 1
        and isinstance(node.args[0], Node)
        and not node.kwargs
    )


def _activation(node: Node, module: torch.nn.Module) -> str | None:
    """The name of the activation that a node computes of one argument; None for any other node."""
    if node.op == "call_module" and len(node.args) == 1:
        return _activation_module(module.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    found = _FUNCTIONS.get(node.target)
    exact = found != "gelu" or (len(node.args) == 1 and node.kwargs.get("approximate", "none") == "none")
    return found if exact else None


def _activation_module(module: Any) -> str | None:
    return None if module is None or _watched(module) else activation_of(module)


def _neighbours(module: torch.nn.Module) -> Iterator[Any]:
    children = list(module._modules.items())
    return itertools.pairwise(children)
