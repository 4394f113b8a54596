"""Modules that drop in for PyTorch's: the same constructors, the same `state_dict` keys, this library's kernels."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import distributed, functional
from ._array_functions.shapes import conv2d_output_shape
from ._core.torch_internals import BatchNormBase, NormBase
from ._torch import arguments
from ._torch.autograd import accumulate_dtype

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Conv2D",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "convert_batch_norm",
]


class _BatchNormForward(NormBase):
    """What the modules of batch normalisation share."""

    def _forward(self, input: Tensor, eps: float, **fused: Any) -> Tensor:
        """(N, C, …) normalised; in training the running statistics are updated. fused: `residual` and `activation`."""
        arguments.tensor(input, "input")
        self._check_input_dim(input)
        used = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if used else (None, None)
        batches = self.num_batches_tracked if self.training and self.track_running_stats else None
        if batches is not None:
            batches.add_(1)
        if batches is None or mean is None or var is None or self.momentum is not None:
            return self._normalize(input, mean, var, 0.0 if self.momentum is None else self.momentum, eps, **fused)
        latest = [v.to(accumulate_dtype(input), copy=True) for v in (mean, var)]
        y = self._normalize(input, latest[0], latest[1], 1.0, eps, **fused)
        share = batches.double().reciprocal()  # of a cumulative average; the number stays on its device
        for average, value in zip((mean, var), latest, strict=True):
            average.copy_(average + (value - average.double()) * share)
        return y

    def _normalize(self, input: Tensor, mean: Any, var: Any, momentum: float, eps: float, **fused: Any) -> Tensor:
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        return functional.batch_norm(input, mean, var, self.weight, self.bias, by_batch, momentum, eps, **fused)


class _BatchNorm(_BatchNormForward, BatchNormBase):
    """PyTorch's module, and nothing more: tools that know `torch.nn.BatchNorm1d/2d/3d` may treat it as one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "activation" in kwargs:
            given = type(self).__name__
            raise TypeError(f"activation: {given} is PyTorch's and has none; use hw3gpu.nn.{given.replace('Norm', 'NormAct')}")
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) normalised; in training the running statistics are updated."""
        return self._forward(input, self.eps)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this library's kernels: (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this library's kernels: (N, C, H, W), channels-last too."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this library's kernels: (N, C, D, H, W), channels-last too."""


class _BatchNormAct(_BatchNormForward):
    """Batch normalisation, an addend and an activation in one: activation(BN(x) + residual).

    Arguments and `state_dict` are those of PyTorch's batch normalisation; and `activation`: "relu", or None. It is no subclass
    of that, for tools that replace, freeze or fold a batch normalisation would leave out the activation; those that read `eps`
    of whatever they are given are refused, its value is `epsilon`. So tools that look for PyTorch's classes pass it over:
    `torch.optim.swa_utils.update_bn`, loops that call `eval` or leave out weight decay.
    """

    epsilon: float
    ranks: tuple[int, ...]

    def __init__(self, *args: Any, activation: str | None = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arguments.activation_of(activation)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, …) normalised, plus `residual`, through `activation`; in training the running statistics are updated."""
        return self._forward(input, self.epsilon, residual=residual, activation=self.activation)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.ranks:
            raise ValueError(f"expected {' or '.join(f'{rank}D' for rank in self.ranks)} input (got {input.dim()}D input)")

    def _set_epsilon(self, value: float) -> None:
        self.epsilon = value

    eps = property(None, _set_epsilon)

    def __getattr__(self, name: str) -> Any:
        if name == "eps":
            raise AttributeError(
                f"{type(self).__name__} has no `eps`, so that nothing folds it into a convolution without its activation and "
                "residual: load its state_dict into a torch.nn.BatchNorm2d(…, eps=….epsilon), and fold that"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, activation={self.activation!r}"
        )


class BatchNormAct1d(_BatchNormAct):
    __doc__ = f"(N, C) or (N, C, L). {_BatchNormAct.__doc__}"
    ranks = (2, 3)


class BatchNormAct2d(_BatchNormAct):
    __doc__ = f"(N, C, H, W), channels-last too. {_BatchNormAct.__doc__}"
    ranks = (4,)


class BatchNormAct3d(_BatchNormAct):
    __doc__ = f"(N, C, D, H, W), channels-last too. {_BatchNormAct.__doc__}"
    ranks = (5,)


class _Synchronised(_BatchNormForward):
    """Batch normalisation by the batches of all processes; its constructor has PyTorch's order of arguments."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("bias"):
            del kwargs["bias"]  # an argument that PyTorch has had since 2.13
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _normalize(self, input: Tensor, mean: Any, var: Any, momentum: float, eps: float, **fused: Any) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super()._normalize(input, mean, var, momentum, eps, **fused)
        return distributed.sync_batch_norm(
            input, mean, var, self.weight, self.bias, True, momentum, eps, self.process_group or None, **fused
        )


class SyncBatchNorm(_Synchronised, _BatchNorm):
    """`torch.nn.SyncBatchNorm` on this library's kernels, on the CPU too: (N, C, …) by the batches of all processes.

    See `distributed.sync_batch_norm`. In evaluation, and where there is no process group or one process, it is the batch
    normalisation of the others. No subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on the CPU; its
    arguments and `state_dict` are the same.
    """

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """`convert_batch_norm` with `sync`."""
        return convert_batch_norm(module, sync=True if process_group is None else process_group)


class SyncBatchNormAct(_Synchronised, _BatchNormAct):
    __doc__ = f"As `SyncBatchNorm` synchronises it: {_BatchNormAct.__doc__}"


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
_log = logging.getLogger(__name__)


def convert_batch_norm(module: torch.nn.Module, *, sync: Any = False) -> torch.nn.Module:
    """Replaces every `torch.nn.BatchNorm1d/2d/3d`, `SyncBatchNorm` in `module` by ours; returns `module`, or its replacement.

    sync: True, or a process group, makes a `SyncBatchNorm` of each of them, our own too, over all processes or that group; one
    that is synchronised already keeps its group where sync is True.
    Parameters, buffers, hooks and the training flag stay the same objects, so that an optimizer goes on working, and device and
    dtype are what they were. A module used in two places stays shared. Subclasses of PyTorch's modules are left alone: lazy and
    parametrised ones, and those of other libraries. With `sync` these are named in a UserWarning: they go on with the batch of
    their own process.

    What was replaced, and what was left alone, is logged to `hw3gpu.nn` at level INFO, one line a layer. Raises TypeError for
    what is no module, and no group.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__module__}.{type(module).__qualname__}")
    if not (isinstance(sync, bool) or (dist.is_available() and isinstance(sync, dist.ProcessGroup))):
        raise TypeError(f"sync: expected a bool or a process group, got {type(sync).__module__}.{type(sync).__qualname__}")
    left: list[str] = []
    converted = _convert(module, "", sync, {}, left)
    if sync and left:
        warnings.warn(f"convert_batch_norm: left alone, and not synchronised: {', '.join(left)}", stacklevel=2)
    return converted


def _convert(
    module: torch.nn.Module, name: str, sync: Any, done: dict[int, torch.nn.Module], left: list[str]
) -> torch.nn.Module:
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = module
    ours = (_SYNCHRONISED if sync else _CONVERTED).get(type(module))
    if ours is type(module):
        if sync is not True:
            module.process_group = sync
    elif ours is not None:
        done[id(module)] = converted = ours.__new__(ours)
        converted.__dict__.update(module.__dict__)
        if sync and (sync is not True or "process_group" not in module.__dict__):
            converted.__dict__["process_group"] = None if sync is True else sync
        _log.info("%s: %s -> %s", name or "(the module)", _named(module), _named(converted))
    else:
        if _is_batch_norm(module) and (sync or not isinstance(module, _BatchNormForward)):
            left.append(f"{name or '(the module)'} ({type(module).__module__}.{type(module).__qualname__})")
            _log.info("%s: %s left alone: only PyTorch's own classes are replaced", name or "(the module)", _named(module))
        for key, child in module._modules.items():
            if child is not None:
                module._modules[key] = _convert(child, f"{name}.{key}" if name else key, sync, done, left)
    return done[id(module)]


def _is_batch_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, (BatchNormBase, _BatchNormForward))


def _named(module: torch.nn.Module) -> str:
    return f"{type(module).__module__.removesuffix('.modules.batchnorm')}.{type(module).__name__}({module.num_features})"


class _Extras(torch.nn.Module):
    """The arguments that losses have beyond PyTorch's: those of `functional.cross_entropy` by keyword. No part of the state."""

    extras: dict[str, Any] = {}  # noqa: RUF012  of a module that was pickled without
    _names: tuple[str, ...] = ("z_loss", "softcap", "gradient", "all_ignored", "return_stats", "differentiable")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        extras = {name: kwargs.pop(name) for name in self._names if name in kwargs}
        super().__init__(*args, **kwargs)
        self.extras = extras

    def extra_repr(self) -> str:
        return ", ".join([*filter(None, [super().extra_repr()]), *(f"{k}={v!r}" for k, v in self.extras.items())])


class CrossEntropyLoss(_Extras, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on this library's kernels; also takes the keyword extras of `functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss of logits `input` for classes or probabilities `target`; (loss, statistics) with `return_stats`."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.extras,
        )


class LinearCrossEntropyLoss(_Extras, torch.nn.LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` on this library's kernels; also takes the keyword extras of
    `functional.linear_cross_entropy`."""

    _names = (*_Extras._names, "chunk_rows")

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """The loss of the logits of `input` for classes or probabilities; (loss, statistics) with `return_stats`."""
        C, D, bias = self.num_classes, self.linear.in_features, self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(C, *self.out_features, D),
            target,
            linear_bias=None if bias is None else bias.reshape(C, *self.out_features),
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.extras,
        )


_AXES = torch.tensor([ord("W"), ord("H")], dtype=torch.uint8)


class Conv2D(torch.nn.Conv2d):
    """Convolution of (B, W, H, C), as the assignment writes it: the first entry of each pair belongs to W, the second to H.

    The arguments are those of `torch.nn.Conv2d`; the computation is torch's. `weight` is (C_out, C_in, k1 over W, k2 over H),
    which a torch `Conv2d` checkpoint is not: its H comes first. `Conv2D.from_torch` converts one, and a `state_dict` without
    this module's mark is refused.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, W, H, C_in) -> (B, W', H', C_out); shapes by docs/derivations.md, section 1."""
        if input.dim() != 4 or input.shape[3] != self.in_channels:
            raise ValueError(f"input: expected (B, W, H, {self.in_channels}), got shape {tuple(input.shape)}")
        self.output_shape(input.shape)
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The shape that an input of shape (B, W, H, C_in) comes out with."""
        padding: Any = self.padding
        if padding == "same":
            B, W, H, _ = input_shape
            return B, W, H, self.out_channels
        if padding == "valid":
            padding = 0
        return conv2d_output_shape(input_shape, self.out_channels, self.kernel_size, self.stride, padding, self.dilation)

    @classmethod
    def from_torch(cls, conv: torch.nn.Conv2d) -> Conv2D:
        """The same convolution as `conv`, whose (N, C, H, W) is our (B, W, H, C)."""
        if not isinstance(conv, torch.nn.Conv2d) or isinstance(conv, Conv2D):
            raise TypeError(f"conv: expected a torch.nn.Conv2d, got {type(conv).__module__}.{type(conv).__qualname__}")
        pair: dict[str, Any] = {
            "kernel_size": conv.kernel_size[::-1],
            "stride": conv.stride[::-1],
            "padding": conv.padding if isinstance(conv.padding, str) else conv.padding[::-1],
            "dilation": conv.dilation[::-1],
        }
        ours = cls(
            conv.in_channels,
            conv.out_channels,
            **pair,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            ours.weight.copy_(conv.weight.transpose(2, 3))
            if ours.bias is not None and conv.bias is not None:
                ours.bias.copy_(conv.bias)
        return ours.train(conv.training)

    def get_extra_state(self) -> Tensor:
        """The mark that tells this module's weights from torch's: the axes of `weight[0, 0]`."""
        return _AXES.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Refuses weights whose axes are not (W, H)."""
        if not torch.equal(torch.as_tensor(state).cpu(), _AXES):
            raise ValueError(f"state_dict: expected weights with axes W, H (mark {_AXES.tolist()}), got {state}")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        mark = state_dict.get(prefix + "_extra_state", _AXES if prefix + "weight" not in state_dict else None)
        if mark is not None and torch.equal(torch.as_tensor(mark).cpu(), _AXES):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix}weight: expected a checkpoint of hw3gpu.nn.Conv2D, whose kernels are (W, H); a torch Conv2d has "
                "(H, W): convert the module with Conv2D.from_torch"
            )
