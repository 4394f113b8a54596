"""Batch normalisation by constants, and the modules of timm and torchvision on this library's kernels.

A module of timm or torchvision gets a subclass of its own class, so that `isinstance` with their class still holds.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .batch_norm import BatchNormForward
from .tools import Proxy, Unscripted, as_leaf
from .torch_modules import TorchFrozenBatchNorm2d, activation_of

__all__ = ["FrozenBatchNorm2d", "OfOthers", "freeze_batch_norm", "of_others"]


class _FrozenForward(Unscripted):
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalised by the constants; gradients go to x alone."""
        if isinstance(x, Proxy):
            return as_leaf(self, x)
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenBatchNorm2d(_FrozenForward, TorchFrozenBatchNorm2d):
    """Batch normalisation by constants, torchvision's arguments and `state_dict`: (N, C, H, W), channels-last too.

    weight, bias, running_mean and running_var are buffers of (C,). A checkpoint of a batch normalisation loads into it.
    """


def freeze_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
    """Calls `freeze()` of every batch normalisation of ours in `module`; returns it. Raises ValueError where there is none."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__module__}.{type(module).__qualname__}")
    found = [one for one in module.modules() if isinstance(one, BatchNormForward)]
    if not found:
        raise ValueError("module: expected batch normalisations of hw3gpu.nn in it, got none: convert_batch_norm comes first")
    for one in found:
        one.freeze()
    return module


# ---------------------------------------------------------------------------------------------- other libraries
class OfOthers(torch.nn.Module):
    """A subclass of the class `theirs` of another library, made when needed. Copies and pickles refer to `theirs`."""

    theirs: type[torch.nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.theirs,), self.__dict__


class _BatchNormThenAct(OfOthers, BatchNormForward):
    """timm's `BatchNormAct2d`: ReLU, SiLU, Hardswish or GELU in the same pass, any other activation after it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalised, through `drop` and `act`."""
        if isinstance(x, Proxy):
            return as_leaf(self, x)
        drop: Any = self._modules["drop"]
        act: Any = self._modules["act"]
        activation = activation_of(act)
        if activation is not None and type(drop) is torch.nn.Identity and not act._forward_hooks:
            return self._forward(x, self.eps, activation=activation)
        return act(drop(self._forward(x, self.eps)))


class _Frozen(OfOthers, _FrozenForward):
    """torchvision's `FrozenBatchNorm2d`."""


def of_others(theirs: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Our class for a class of another library; None where there is none."""
    library = theirs.__module__.partition(".")[0]
    mixin = {("timm", "BatchNormAct2d"): _BatchNormThenAct, ("torchvision", "FrozenBatchNorm2d"): _Frozen}.get(
        (library, theirs.__name__)
    )
    known: Any = _subclass  # whose cache mypy does not take a class for a key of
    return None if mixin is None or issubclass(theirs, OfOthers) else known(theirs, mixin, library)


@functools.cache
def _subclass(theirs: type[torch.nn.Module], mixin: type[torch.nn.Module], library: str) -> type[torch.nn.Module]:
    body = {"theirs": theirs, "__module__": "hw3gpu.nn", "__doc__": f"{library}'s {theirs.__name__} on this library's kernels."}
    return type(f"{library.capitalize()}{theirs.__name__}", (mixin, theirs), body)


def _new(theirs: type[torch.nn.Module]) -> torch.nn.Module:
    """A module without its state."""
    ours = of_others(theirs)
    assert ours is not None
    return ours.__new__(ours)
