"""Modules that drop in for PyTorch's: the same constructors, the same `state_dict` keys, this library's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._array_functions.shapes import conv2d_output_shape
from ._nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNorm,
    SyncBatchNormAct,
)
from ._nn.conversion import convert_batch_norm, to_torch
from ._nn.frozen import FrozenBatchNorm2d, freeze_batch_norm
from ._nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from ._nn.tools import Proxy, as_leaf

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Conv2D",
    "CrossEntropyLoss",
    "FrozenBatchNorm2d",
    "LinearCrossEntropyLoss",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "convert_batch_norm",
    "freeze_batch_norm",
    "to_torch",
]

for _name in __all__:  # the name that pickles, logs and graphs have of what the modules of `_nn` define
    if _name in globals():
        globals()[_name].__module__ = __name__

_AXES = torch.tensor([ord("W"), ord("H")], dtype=torch.uint8)


class Conv2D(torch.nn.Conv2d):
    """Convolution of (B, W, H, C), as the assignment writes it: the first entry of each pair belongs to W, the second to H.

    The arguments are those of `torch.nn.Conv2d`; the computation is torch's. `weight` is (C_out, C_in, k1 over W, k2 over H),
    which a torch `Conv2d` checkpoint is not: its H comes first. `Conv2D.from_torch` converts one, and a `state_dict` without
    this module's mark is refused.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, W, H, C_in) -> (B, W', H', C_out); shapes by docs/derivations.md, section 1."""
        if isinstance(input, Proxy):
            return as_leaf(self, input)
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
        turned: dict[str, Any] = {name: getattr(conv, name)[::-1] for name in ("kernel_size", "stride", "dilation")}
        turned["padding"] = conv.padding if isinstance(conv.padding, str) else conv.padding[::-1]
        ours = cls(
            conv.in_channels, conv.out_channels, **turned, groups=conv.groups, bias=conv.bias is not None,
            padding_mode=conv.padding_mode, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mark = state_dict.get(prefix + "_extra_state", _AXES if prefix + "weight" not in state_dict else None)
        if mark is not None and torch.equal(torch.as_tensor(mark).cpu(), _AXES):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix}weight: expected a checkpoint of hw3gpu.nn.Conv2D, whose kernels are (W, H); a torch Conv2d has "
                "(H, W): convert the module with Conv2D.from_torch"
            )
