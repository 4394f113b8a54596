"""The positions that count in a masked batch normalisation: a bool each as given, a bit each for the kernels.

Bit n S + s of `bits`, the least of a byte first, says whether position s of sample n counts; the mask of all channels. A byte
follows the last, so that eight bits from any one on lie in two bytes. docs/derivations.md, section 2.6.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """bits: uint8; n: how many of the positions count, int64 of shape (1,), on their device."""

    bits: Tensor
    n: Tensor


def bytes_of(positions: int) -> int:
    """Bytes of the bits of so many positions."""
    return positions // 8 + 2


def packed(mask: Tensor) -> Positions:
    """Of mask (N, …), a bool a position. PyTorch's operations, so that a compiler fuses them and no device is waited for."""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, 8 * bytes_of(flat.numel()) - flat.numel())).view(-1, 8)
    bits = padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)  # made there: no copy from the host
    return Positions(bits.sum(1, dtype=torch.uint8), flat.sum().reshape(1))


def unpacked(bits: Tensor, x: Tensor) -> Tensor:
    """The mask of x (N, C, …) from its bits, as it broadcasts against x."""
    shape = (x.shape[0], 1, *x.shape[2:])
    on = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return on.reshape(-1)[: math.prod(shape)].view(shape).bool()
