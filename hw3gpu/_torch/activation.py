"""Activations behind a batch normalisation in PyTorch's operations, and their derivatives, which have derivatives again.

The kernels' formulas, and why they are these: docs/derivations.md, section 2.6.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "silu", "hardswish", "gelu")


def applied(p: Tensor, activation: str | None) -> Tensor:
    """a(p)."""
    if activation is None:
        return p
    result: Tensor = {"relu": torch.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}[activation](p)
    return result


def let_through(dy: Tensor, p: Tensor, activation: str) -> Tensor:
    """dy a'(p); of "relu" the kernels tell."""
    if activation == "silu":
        return dy * p.sigmoid() * (1 + p * (-p).sigmoid())
    if activation == "hardswish":
        return torch.where(p <= -3, torch.zeros_like(dy), torch.where(p >= 3, dy, dy * (p / 3 + 0.5)))
    if activation == "gelu":
        density = (-0.5 * p * p).exp() / math.sqrt(2 * math.pi)
        return dy * (0.5 * (1 + (p / math.sqrt(2)).erf()) + p * density)
    raise AssertionError(activation)


def is_remade(activation: str | None) -> bool:
    """True where the backward pass computes p again, from x and the residual; for "relu" a mask is kept in its place."""
    return activation not in (None, "relu")
