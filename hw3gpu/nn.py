"""Modules that drop in for PyTorch's: the same constructors, the same `state_dict` keys, this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from ._autograd import accumulate_dtype
from .shapes import conv2d_output_shape

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Conv2D", "CrossEntropyLoss", "convert_batch_norm"]


class _BatchNormForward(torch.nn.modules.batchnorm._BatchNorm):
    """What the modules of batch normalisation share.

    activation: "relu", or None. It is no part of the state: a `state_dict` is PyTorch's.
    """

    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation not in (None, "relu"):
            raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, …) normalised, plus `residual`, through `activation`; in training the running statistics are updated in place."""
        self._check_input_dim(input)
        tracked = self.training and self.track_running_stats and self.num_batches_tracked is not None
        if tracked:
            self.num_batches_tracked.add_(1)
        used = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if used else (None, None)
        if tracked and self.momentum is None and self.running_mean is not None and self.running_var is not None:
            latest = tuple(torch.zeros_like(v, dtype=accumulate_dtype(input)) for v in running)
            y = self._normalize(input, *latest, 1.0, residual)
            _average_in(running, latest, self.num_batches_tracked)
            return y
        return self._normalize(input, *running, 0.0 if self.momentum is None else self.momentum, residual)

    def _normalize(
        self, input: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float, residual: Tensor | None
    ) -> Tensor:
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        return functional.batch_norm(
            input, mean, var, self.weight, self.bias, by_batch, momentum, self.eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def _average_in(running: tuple[Tensor, Tensor], latest: tuple[Tensor, Tensor], batches: Tensor) -> None:
    """A cumulative average: r <- r + (latest - r) / batches, whose number stays on the device."""
    share = batches.double().reciprocal()
    for old, new in zip(running, latest, strict=True):
        old.copy_(old + (new - old.double()) * share)


class BatchNorm1d(_BatchNormForward, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on this library's kernels: (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNormForward, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on this library's kernels: (N, C, H, W), channels-last too."""


class BatchNorm3d(_BatchNormForward, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on this library's kernels: (N, C, D, H, W), channels-last too."""


_CONVERTED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


def convert_batch_norm(module: torch.nn.Module) -> torch.nn.Module:
    """Replaces every `torch.nn.BatchNorm1d/2d/3d` in `module` by ours; returns `module`, or its replacement.

    Parameters, buffers, hooks and the training flag stay the same objects, so that an optimizer goes on working. A module
    used in two places stays shared. Subclasses of PyTorch's modules are left alone.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__module__}.{type(module).__qualname__}")
    return _convert(module, {})


def _convert(module: torch.nn.Module, done: dict[int, torch.nn.Module]) -> torch.nn.Module:
    if id(module) not in done:
        done[id(module)] = module
        ours = _CONVERTED.get(type(module))
        if ours is not None:
            done[id(module)] = converted = ours.__new__(ours)
            converted.__dict__.update(module.__dict__)
        else:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = _convert(child, done)
    return done[id(module)]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on this library's kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits `input` for classes or probabilities `target`."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
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
