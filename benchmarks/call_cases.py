"""Calls of the public functions at sizes that people train with: their predicted time stands beside their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import hw3gpu.functional as HF

from .evidence.case import Case, batch_norm_moves, cross_entropy_moves, softmax_moves

F32, BF16 = torch.float32, torch.bfloat16
HELD = 16384  # values of a channel that a program keeps (kernels/README.md)


@dataclass(frozen=True)
class Call:
    """A call: `run(device)` makes it, forward and backward."""

    operation: str  # "batch norm", "cross entropy" or "softmax"
    shape: tuple[int, ...]
    dtype: torch.dtype
    option: str = ""  # "channels-last", "residual and ReLU", 'gradient="forward"'

    @property
    def name(self) -> str:
        return f"{self.operation}, call{self.option and f', {self.option}'} {'x'.join(map(str, self.shape))}"

    @property
    def label(self) -> str:
        """Of its case in evidence.json."""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        """Of its largest tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def fused(self) -> bool:
        return self.option == "residual and ReLU"

    @property
    def least(self) -> dict[str, tuple[int, int]]:
        """Pass -> (bytes that any kernel moves, bytes of them that it reads once more where no cache holds them).

        A channel of batch normalisation of up to HELD values is read once.
        """
        size, bits = self.nbytes, self.nbytes // self.dtype.itemsize // 8 * self.fused
        if self.operation == "batch norm":
            more, fits = size * self.fused + bits, math.prod(self.shape) // self.shape[1] <= HELD
            return {"forward": (2 * size + more, 0 if fits else size), "backward": (3 * size + more, 0 if fits else 2 * size)}
        if self.operation == "softmax":
            return {"forward": (2 * size, 0), "backward": (3 * size, 0)}
        early = self.option == 'gradient="forward"'
        return {"forward": (size * (1 + early), 0), "backward": (0 if early else 2 * size, 0)}

    @property
    def moves(self) -> dict[str, tuple[int, int]]:
        """As of `Case`."""
        if self.operation == "batch norm":
            return batch_norm_moves(self.nbytes, math.prod(self.shape), self.fused, training=True)
        if self.operation == "softmax":
            return softmax_moves(self.nbytes)
        return cross_entropy_moves(self.nbytes, soft=False, at_once=self.option == 'gradient="forward"')

    def prepared(self, device: str) -> Callable[[], torch.Tensor]:
        """The forward pass on new tensors of `device`; what it returns has a graph."""
        x = self._new(device).requires_grad_()
        if self.operation == "softmax":
            return lambda: HF.softmax(x, -1)
        if self.operation == "cross entropy":
            options: dict[str, Any] = {"gradient": "forward"} if self.option else {"gradient": "backward"}
            target = torch.zeros(self.shape[0], dtype=torch.int64, device=device)
            return lambda: HF.cross_entropy(x, target, **options)
        C = self.shape[1]
        running = torch.zeros(C, device=device), torch.ones(C, device=device)
        weight, bias = (torch.ones(C, device=device, requires_grad=True) for _ in range(2))
        more: dict[str, Any] = {"residual": self._new(device).requires_grad_(), "activation": "relu"} if self.fused else {}
        return lambda: HF.batch_norm(x, *running, weight, bias, training=True, **more)

    def run(self, device: str = "meta") -> None:
        """Forward and backward."""
        y = self.prepared(device)()
        y.backward(torch.ones_like(y))

    def _new(self, device: str) -> torch.Tensor:
        layout = torch.channels_last if self.option == "channels-last" else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, device=device).to(memory_format=layout)


CALLS = (
    Call("batch norm", (32, 256, 56, 56), F32),
    Call("batch norm", (128, 256, 56, 56), BF16),
    Call("batch norm", (32, 64, 112, 112), F32),
    Call("batch norm", (128, 512, 28, 28), BF16),
    Call("batch norm", (32, 1024, 14, 14), BF16),
    Call("batch norm", (128, 2048, 7, 7), F32),
    Call("batch norm", (128, 64, 56, 56), BF16, "channels-last"),
    Call("batch norm", (128, 256, 56, 56), BF16, "residual and ReLU"),
    Call("cross entropy", (4096, 1000), F32),
    Call("cross entropy", (8192, 32000), BF16),
    Call("cross entropy", (4096, 50257), BF16),
    Call("cross entropy", (8192, 128256), BF16),
    Call("cross entropy", (8192, 128256), BF16, 'gradient="forward"'),
    Call("softmax", (4096, 1000), F32),
    Call("softmax", (8192, 32000), BF16),
)


def cases() -> Iterator[Case]:
    """Each call as a case of the evidence."""
    for call in CALLS:
        yield Case(call.name, call.dtype, False, call.run, call.moves)
