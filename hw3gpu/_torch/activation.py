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


def masked(which: str, activation: str | None) -> bool:
    """True where the forward pass keeps a bit an element of what passed; else the backward pass computes p again."""
    return activation == "relu" and which == "gpu"


def kept(
    which: str, activation: str | None, bias: Tensor | None, residual: Tensor | None, y: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What to save for that in addition to x: the bias and the residual; for "relu" the result, which later layers save too."""
    if activation is None or masked(which, activation):
        return None, None
    return (None, y) if activation == "relu" else (bias, residual)
