"""What evidence is of: a launch or a call, and the bytes of whole tensors that its kernels move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

OPERATIONS = ("softmax", "cross_entropy", "token_log_probs", "distillation", "batch_norm", "moments")


@dataclass(frozen=True)
class Case:
    """One launch of the library: `run()` makes it."""

    name: str
    dtype: torch.dtype
    heavy: bool  # its plan's heaviest set of options: compiled by the tests, for every architecture
    run: Callable[[], None]
    # kernel -> bytes of whole tensors that it reads and writes (kernels/README.md), each once; of no other kernel is that much
    moves: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def operation(self) -> str:
        """The file of kernels/gpu whose launchers it calls."""
        return next(operation for operation in OPERATIONS if self.name.startswith(operation.replace("_", " ")))

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def bytes_of(shape: tuple[int, int, int], dtype: torch.dtype, strided: bool = False) -> int:
    """Of a tensor; with a stride between its numbers all that lies between them moves too."""
    return math.prod(shape) * dtype.itemsize * (2 if strided else 1)


def softmax_moves(size: int) -> dict[str, tuple[int, int]]:
    return {"_forward_kernel": (size, size), "_backward_kernel": (2 * size, size)}


def cross_entropy_moves(size: int, soft: bool, at_once: bool) -> dict[str, tuple[int, int]]:
    read = size * (1 + soft)
    return {"_forward_kernel": (read, size * at_once), "_backward_kernel": (0 if at_once else read, 0 if at_once else size)}


def token_log_probs_moves(size: int) -> dict[str, tuple[int, int]]:
    return {"_forward_kernel": (size, 0), "_backward_kernel": (size, size)}


def distillation_moves(size: int, gradients: int) -> dict[str, tuple[int, int]]:
    """The forward kernels read both rows, the backward kernel again, and writes one gradient or two."""
    read = (2 * size, 0)
    return {"_divergence_kernel": read, "_jensen_shannon_kernel": read, "_backward_kernel": (2 * size, gradients * size)}


def batch_norm_moves(
    size: int, values: int, fused: bool, training: bool, activation: str | None = None
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """A channel in one tile takes the kernels of the first line, else those of the others.

    fused: with a residual, and where no activation is named with the mask of ReLU. The backward pass reads x and the residual
    for what went into an activation that is named.
    """
    bits = 0 if activation else values // 8 * fused
    gate = size * fused if activation else bits
    return {
        "_forward_kernel": (size * (1 + fused), size + bits), "_backward_kernel": (2 * size + gate, size * (1 + fused)),
        "_statistics_kernel": (size, 0), "_normalize_kernel": (size * (1 + fused), size + bits),
        "_backward_reduce_kernel": (2 * size + gate, 0),
        "_backward_apply_kernel": (size * (1 + (training or activation is not None)) + gate, size * (1 + fused)),
    }  # fmt: skip
