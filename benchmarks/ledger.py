"""Evidence step 2: the bytes that a Triton kernel asks to load and store, counted in the interpreter, re-reads included.

    with ledger(z=z, dz=dz) as book:
        launcher(z, dz)
    book.passes("z", "dz")      # how often the two tensors are read or written as a whole, in units of the first

It works on any Triton kernel on host tensors, where TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from .evidence.compile_without_gpu import count_accesses

SECTOR = 32  # bytes: the smallest piece that a GPU's cache moves


@dataclass
class Ledger:
    """Bytes asked for and sectors touched, by (tensor, 'load' | 'store'); launches by kernel."""

    tensors: dict[str, torch.Tensor]
    asked: Counter = field(default_factory=Counter)
    sectors: Counter = field(default_factory=Counter)
    kernels: list[str] = field(default_factory=list)

    def passes(self, *names: str) -> float:
        """Bytes asked of the tensors named, loads and stores together, over the bytes of the first."""
        asked = sum(self.asked[name, kind] for name in names for kind in ("load", "store"))
        return asked / self._bytes(names[0])

    def sector_ratio(self, *names: str) -> float:
        """Bytes of the sectors that the accesses touch, over the bytes they ask for."""
        keys = [(name, kind) for name in names for kind in ("load", "store")]
        return sum(self.sectors[key] for key in keys) * SECTOR / sum(self.asked[key] for key in keys)

    def _bytes(self, name: str) -> int:
        return self.tensors[name].numel() * self.tensors[name].element_size()

    def _observe(self, kernel: str, kind: str, addresses: np.ndarray, itemsize: int) -> None:
        for name, tensor in self.tensors.items():
            storage = tensor.untyped_storage()
            if addresses.size and storage.data_ptr() <= int(addresses.flat[0]) < storage.data_ptr() + storage.nbytes():
                self.asked[name, kind] += addresses.size * itemsize
                self.sectors[name, kind] += np.unique(addresses // SECTOR).size
                return


@contextlib.contextmanager
def ledger(**tensors: torch.Tensor) -> Iterator[Ledger]:
    """Counts the accesses of the interpreted kernels launched inside, for the tensors named."""
    book = Ledger(tensors)
    with count_accesses(book._observe, book.kernels.append):
        yield book
