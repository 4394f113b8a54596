"""Arrays in the memory layouts that a kernel meets, surrounded by NaN wherever the layout leaves room."""

from __future__ import annotations

from typing import Any

import numpy as np

from hw3gpu._cli.arrays import Place, to_numpy

LAYOUTS = ("contiguous", "channels-last", "sliced", "shifted", "reversed")


class Tensors(Place):
    """torch tensors alone, with what `kit` offers: for tests of kernels, which see no difference between kinds."""

    def __init__(self, device: str) -> None:
        super().__init__("torch", device)

    def numpy(self, x: Any) -> np.ndarray:
        """`x` as a new float64 NumPy array."""
        return to_numpy(x)


def to_torch(x: Any) -> Any:
    """A new contiguous torch tensor of the values, dtype and device of `x`, which may be of any kind."""
    import torch

    return torch.as_tensor(x.copy() if isinstance(x, np.ndarray) else x).detach().clone().contiguous()


def in_layout(kit: Any, values: Any, dtype: str, layout: str) -> Any:
    """`values` as an array of `kit`, whose memory is laid out as `layout` says.

    contiguous     the last axis fastest
    channels-last  axis 1 fastest
    sliced         every second element of the last axis of a longer array
    shifted        contiguous, from one element behind the start of an allocation
    reversed       the last axis backwards; contiguous where the kind has no negative strides (torch)
    """
    values = np.ascontiguousarray(values)
    if layout == "channels-last":
        return kit.array(np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1), dtype)
    if layout == "sliced":
        wide = np.full((*values.shape[:-1], 2 * values.shape[-1] + 1), np.nan)
        wide[..., 1::2] = values
        return kit.array(wide, dtype)[..., 1::2]
    if layout == "shifted":
        return kit.array(np.pad(values.ravel(), 1, constant_values=np.nan), dtype)[1:-1].reshape(values.shape)
    if layout == "reversed" and kit.kind != "torch":
        return kit.array(np.ascontiguousarray(values[..., ::-1]), dtype)[..., ::-1]
    return kit.array(values, dtype)
