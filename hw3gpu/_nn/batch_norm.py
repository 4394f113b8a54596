"""Modules of batch normalisation: PyTorch's arguments and `state_dict`, this library's kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed, functional
from .._core.torch_internals import BatchNormBase, NormBase
from .._torch import arguments
from .._torch.autograd import accumulate_dtype
from .tools import Proxy, Unscripted, as_leaf


class BatchNormForward(Unscripted, NormBase):
    """What the modules of batch normalisation share."""

    frozen: bool = False

    def freeze(self) -> BatchNormForward:
        """Sets evaluation, which `train()` does not change, and no gradients for weight and bias; returns the module.

        The running statistics no longer change. `unfreeze` undoes this.
        """
        self.frozen = True
        return self.train(False).requires_grad_(False)

    def unfreeze(self) -> BatchNormForward:
        """Sets training, and gradients for weight and bias; returns the module."""
        self.frozen = False
        return self.train().requires_grad_(True)

    def train(self, mode: bool = True) -> BatchNormForward:
        """As for every module, but a frozen one stays in evaluation."""
        return super().train(mode and not self.frozen)

    def _forward(self, input: Tensor, eps: float, **fused: Any) -> Tensor:
        """(N, C, …) normalised; in training the running statistics are updated. fused: `residual`, `activation`, `mask` and
        `lengths` of `functional.batch_norm`."""
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


class _BatchNorm(BatchNormForward, BatchNormBase):
    """PyTorch's module with other kernels: tools that know `torch.nn.BatchNorm1d/2d/3d` may treat it as one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "activation" in kwargs:
            given = type(self).__name__
            raise TypeError(f"activation: {given} is PyTorch's and has none; use hw3gpu.nn.{given.replace('Norm', 'NormAct')}")
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """(N, C, …) normalised; in training the running statistics are updated. mask and lengths: what counts, as in
        `functional.batch_norm`."""
        if isinstance(input, Proxy):
            return as_leaf(self, input, mask=mask, lengths=lengths)
        return self._forward(input, self.eps, mask=mask, lengths=lengths)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this library's kernels: (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this library's kernels: (N, C, H, W), channels-last too."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this library's kernels: (N, C, D, H, W), channels-last too."""


class _BatchNormAct(BatchNormForward):
    """Batch normalisation, an addend and an activation in one: activation(BN(x) + residual).

    Arguments and `state_dict` are those of PyTorch's batch normalisation, and `activation`: "relu", "silu", "hardswish", "gelu"
    (by erf), or None. It is no subclass of PyTorch's, because tools that replace, freeze or fold a batch normalisation would
    lose the activation. The attribute `eps` is called `epsilon`, so that tools which read `eps` of any module raise an error.
    Tools that look for PyTorch's classes skip this one: `torch.optim.swa_utils.update_bn`, and loops that call `eval` or leave
    out weight decay.
    """

    epsilon: float
    ranks: tuple[int, ...]

    def __init__(self, *args: Any, activation: str | None = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        arguments.activation_of(activation)
        self.activation = activation

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """(N, C, …) normalised, plus `residual`, through `activation`; in training the running statistics are updated. mask and
        lengths: what counts, as in `functional.batch_norm`."""
        if isinstance(input, Proxy):
            return as_leaf(self, input, residual=residual, mask=mask, lengths=lengths)
        fused = {"residual": residual, "activation": self.activation, "mask": mask, "lengths": lengths}
        return self._forward(input, self.epsilon, **fused)

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


class _Synchronised(BatchNormForward):
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
        from .conversion import convert_batch_norm

        return convert_batch_norm(module, sync=True if process_group is None else process_group)


class SyncBatchNormAct(_Synchronised, _BatchNormAct):
    __doc__ = f"As `SyncBatchNorm` synchronises it: {_BatchNormAct.__doc__}"
