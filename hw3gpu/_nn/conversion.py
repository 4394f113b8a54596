"""PyTorch's modules replaced by ours in a model, and back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .._core.torch_internals import BatchNormBase
from . import fusion
from .batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormForward,
    SyncBatchNorm,
    SyncBatchNormAct,
)
from .frozen import FrozenBatchNorm2d, OfOthers, of_others
from .losses import CrossEntropyLoss, LinearCrossEntropyLoss
from .torch_modules import ACTIVATIONS, TorchBatchNormAct, TorchFrozenBatchNorm2d

__all__ = ["convert_batch_norm", "to_torch"]

_CONVERTED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
_SYNCHRONISED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    **dict.fromkeys((*_CONVERTED, *_CONVERTED.values()), SyncBatchNorm),
    **dict.fromkeys((BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct), SyncBatchNormAct),
}
_log = logging.getLogger("hw3gpu.nn")


def convert_batch_norm(module: torch.nn.Module, *, sync: Any = False, fuse: bool = False) -> torch.nn.Module:
    """Replaces every `torch.nn.BatchNorm1d/2d/3d`, `SyncBatchNorm` in `module` by ours; returns `module`, or its replacement.

    sync: True, or a process group, makes a `SyncBatchNorm` of each of them, our own too, over all processes or that group; one
    that is synchronised already keeps its group where sync is True.
    Parameters, buffers, hooks and the training flag stay the same objects, so that an optimizer goes on working, and device and
    dtype are what they were. A module used in two places stays shared. timm's `BatchNormAct2d` (its ReLU, SiLU, Hardswish or
    GELU in the same pass, any other activation after it) and torchvision's `FrozenBatchNorm2d` become subclasses of theirs.
    Other subclasses of PyTorch's modules are left alone: lazy and parametrised ones, and those of other libraries. With `sync`
    these, and timm's, are named in a UserWarning: they go on with the batch of their own process.

    fuse: True finds batch normalisation -> activation and batch normalisation -> add -> activation (ReLU, SiLU, Hardswish, GELU
    by erf) by tracing every module's `forward` with `torch.fx`, and computes each in one pass, in training and in evaluation. A
    module in which it finds some gets a subclass of its class with another `forward`; the layers and their names do not change.
    The module's own `forward` runs where an argument is no tensor, where the layers have hooks (one by one), and after an
    attribute of the module was set. A UserWarning names modules that cannot be traced, which are left alone, and says where
    there is nothing to fuse.

    What was replaced, left alone and fused, is logged to `hw3gpu.nn` at level INFO, one line a layer. Raises TypeError for what
    is no module, no group and no bool.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__module__}.{type(module).__qualname__}")
    if not (isinstance(sync, bool) or (dist.is_available() and isinstance(sync, dist.ProcessGroup))):
        raise TypeError(f"sync: expected a bool or a process group, got {type(sync).__module__}.{type(sync).__qualname__}")
    if not isinstance(fuse, bool):
        raise TypeError(f"fuse: expected a bool, got {type(fuse).__module__}.{type(fuse).__qualname__}")
    left: list[str] = []
    converted = _replaced(module, lambda one, name: _converted(one, name, sync, left), "", {})
    if sync and left:
        warnings.warn(f"convert_batch_norm: left alone, and not synchronised: {', '.join(left)}", stacklevel=2)
    if fuse:
        fusion.fuse(converted)
    return converted


def _replaced(
    module: torch.nn.Module, replace: Callable[[torch.nn.Module, str], torch.nn.Module], name: str, done: dict[int, Any]
) -> torch.nn.Module:
    """What `replace` makes of a module and its name; of one that it gives back, the children are replaced. Each module once."""
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = after = replace(module, name or "(the module)")
    if after is not module:
        _log.info("%s: %s -> %s", name or "(the module)", _named(module), _named(after))
        return after
    for key, child in module._modules.items():
        if child is not None:
            module._modules[key] = _replaced(child, replace, f"{name}.{key}" if name else key, done)
    return module


def _converted(module: torch.nn.Module, name: str, sync: Any, left: list[str]) -> torch.nn.Module:
    """Our module for PyTorch's, or the module itself; `left`: the batch normalisations that are left alone."""
    ours = _SYNCHRONISED.get(type(module)) if sync else _CONVERTED.get(type(module)) or of_others(type(module))
    if ours is type(module):
        if sync is not True:
            module.process_group = sync
    elif ours is not None:
        converted = ours.__new__(ours)
        converted.__dict__.update(module.__dict__)
        if sync and (sync is not True or "process_group" not in module.__dict__):
            converted.__dict__["process_group"] = None if sync is True else sync
        return converted
    elif _is_batch_norm(module) and (sync or not isinstance(module, BatchNormForward)):
        left.append(f"{name} ({type(module).__module__}.{type(module).__qualname__})")
        _log.info("%s: %s left alone: only PyTorch's own classes are replaced", name, _named(module))
    return module


# ---------------------------------------------------------------------------------------------- the way back
_BACK: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    **{ours: theirs for theirs, ours in _CONVERTED.items()},
    CrossEntropyLoss: torch.nn.CrossEntropyLoss,
    LinearCrossEntropyLoss: torch.nn.LinearCrossEntropyLoss,
    FrozenBatchNorm2d: TorchFrozenBatchNorm2d,
}
_NORM_OF: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    BatchNormAct1d: torch.nn.BatchNorm1d,
    BatchNormAct2d: torch.nn.BatchNorm2d,
    BatchNormAct3d: torch.nn.BatchNorm3d,
    SyncBatchNormAct: torch.nn.SyncBatchNorm,
}


def to_torch(module: torch.nn.Module) -> torch.nn.Module:
    """The way back: every module of ours in `module` replaced by PyTorch's; returns `module`, or its replacement.

    For tools that know only PyTorch's own classes: `torch.jit.script`, `fuse_modules`, FX fusion and quantisation. A batch
    normalisation becomes the module that `convert_batch_norm` takes. A `BatchNormAct1d/2d/3d` or `SyncBatchNormAct` becomes a
    module of PyTorch's batch normalisation (`norm`), the sum and the activation, with the same `state_dict` and call. A loss
    becomes PyTorch's. A frozen module comes out in evaluation, from where `train()` takes it. `Conv2D` computes in PyTorch's
    operations and stays.

    Parameters, buffers, hooks and the training flag stay the same objects, and a module used in two places stays shared. What
    was replaced is logged to `hw3gpu.nn` at level INFO. Raises TypeError for what is no module, and ValueError, with nothing
    replaced, where PyTorch has no equal: subclasses and parametrised modules of ours, losses with `z_loss`, `softcap` and the
    like.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__module__}.{type(module).__qualname__}")
    found = [(name or "(the module)", why) for name, one in module.named_modules() if (why := _why_not(one))]
    if found:
        raise ValueError("to_torch: PyTorch has no equal of " + "; ".join(f"{name}: {why}" for name, why in found))
    return _replaced(module, _back, "", {})


def _why_not(module: torch.nn.Module) -> str | None:
    """What of a module of ours PyTorch's does not have; None where there is nothing such."""
    of = type(module)
    kinds = (BatchNormForward, FrozenBatchNorm2d, CrossEntropyLoss, LinearCrossEntropyLoss)
    if isinstance(module, kinds) and _back_of(of) is None and of not in _NORM_OF:
        return f"{of.__module__}.{of.__qualname__}, a subclass of ours"
    extras = getattr(module, "extras", {}) if of in _BACK else {}
    differ = [f"{name}={value!r}" for name, value in extras.items() if value != _DEFAULTS.get(name, value)]
    return f"{of.__name__} with {', '.join(differ)}" if differ else None


# arguments of losses that change what comes out; the others choose how it is computed
_DEFAULTS = {"z_loss": 0.0, "softcap": None, "all_ignored": "nan", "return_stats": False, "differentiable": False}


def _back_of(ours: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    if issubclass(ours, OfOthers) and ours is of_others(ours.theirs):
        return ours.theirs
    return _BACK.get(ours)


def _back(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """PyTorch's module for ours, or the module itself."""
    if isinstance(module, fusion.Fused):
        module.__class__ = module.base  # type: ignore[assignment]
    if type(module) in _NORM_OF:
        return _composed(module)
    theirs = _back_of(type(module))
    if theirs is None:
        return module
    back = theirs.__new__(theirs)
    back.__dict__.update({key: value for key, value in module.__dict__.items() if key not in {"extras", "frozen"}})
    return back


def _composed(module: Any) -> TorchBatchNormAct:
    """Batch normalisation, sum and activation; hooks are those of the whole."""
    of = _NORM_OF[type(module)]
    norm = of.__new__(of)
    torch.nn.Module.__init__(norm)
    hooks = {key for key in norm.__dict__ if "hook" in key}
    own = {key: value for key, value in module.__dict__.items() if key not in {*hooks, "activation", "epsilon", "frozen"}}
    norm.__dict__.update(own, eps=module.epsilon)
    composed = TorchBatchNormAct(norm, ACTIVATIONS.get(module.activation, torch.nn.Identity)())
    composed.training = module.training
    for key in hooks:  # the dict itself, which the handles of its hooks hold
        held = module.__dict__[key]
        if isinstance(held, dict):
            held.update(composed.__dict__[key])
        composed.__dict__[key] = held
    return composed


def _is_batch_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, (BatchNormBase, BatchNormForward))


def _named(module: torch.nn.Module) -> str:
    name = f"{type(module).__module__.partition('.modules.')[0]}.{type(module).__name__}"
    return f"{name}({module.num_features})" if hasattr(module, "num_features") else name
