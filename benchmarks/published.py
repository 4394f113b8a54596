"""Times that others published of their own kernels, which the time model is held to.

Of Liger's kernels the installed package has the code: they are compiled and predicted as this library's are. Of the others the
model knows the bytes alone, and what it says is a floor. Taken were figures read at the address given, of kernels that reach
half of the bandwidth or more. docs/time_model.md says which choices were made with them in sight.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hw3gpu.kernels.gpu.device import B200, H100, H200, Device, in_flight

from . import time_model
from .evidence.case import Case
from .evidence.run import examined

FILE = Path(__file__).with_name("others.json")
F32, BF16 = torch.float32, torch.bfloat16

# NVIDIA's data sheets
H100_NVL = replace(H100, name="H100 NVL", bandwidth=3.9e12)
H20 = Device("H20", 78, 65536, 2048, 228 << 10, 60 << 20, 4.0e12, in_flight(4.0e12, 78))

LIGER = "https://github.com/linkedin/Liger-Kernel"
CSV_2026 = f"{LIGER}/blob/7097ab9c4f1f17176e1bd493ad400e89312df0c0/benchmark/data/all_benchmark_data_megatron.csv"
CSV_2025 = f"{LIGER}/blob/3534d4461ca89319e29c890c1a4c20cb2a615d5f/benchmark/data/h100_all_benchmark_data.csv"
CSV_2024 = (
    f"{LIGER}/blob/61594612d69a75a7a47e6a9398d4ef4f2b068188/benchmark/cross_entropy_speed/nvidia_h100_80gb_hbm3/"
    "cross-entropy-fwd-speed-benchmark.csv"
)
QUACK = "https://github.com/Dao-AILab/quack/blob/main/media/2025-07-10-membound-sol.md"
CUTLASS = "https://github.com/NVIDIA/cutlass/pull/2917"
CUTE_LIGER = f"{LIGER}/pull/1462"
TILEOPS = "https://tile-ai.github.io/TileOPs.github.io/benchmarks/normalization/"
FLAGGEMS = "https://github.com/flagos-ai/FlagGems/pull/5578"


@dataclass(frozen=True)
class Published:
    """A time that somebody published of a kernel that reads and writes a tensor once."""

    whose: str
    operation: str  # "cross entropy": loss and gradient; "softmax", "layer norm", "RMS norm": forward
    shape: tuple[int, int]
    dtype: torch.dtype
    gpu: Device
    microseconds: float
    address: str

    @property
    def label(self) -> str:
        return f"{self.operation} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def compiled(self) -> bool:
        """Whether its code is at hand: Liger's Triton kernels."""
        return self.whose == "Liger"


PUBLISHED = (
    *(
        Published("Liger", "cross entropy", (8192, V), BF16, H100, us, CSV_2026)
        for V, us in ((32768, 646.1), (65536, 1083.6), (131072, 2107.5))
    ),
    *(
        Published("Liger", "cross entropy", (16384, V), F32, H100, us, CSV_2024)
        for V, us in ((8192, 454.1), (16384, 798.8), (32768, 1573.4), (65536, 3951.6), (131072, 8540.3))
    ),
    *(
        Published("Liger", "layer norm", (4096, N), F32, H100_NVL, us, CSV_2025)
        for N, us in ((2048, 26.05), (4096, 45.54), (8192, 82.98), (16384, 182.4))
    ),
    *(
        Published("Liger", "RMS norm", (2048, N), BF16, H100_NVL, us, CSV_2025)
        for N, us in ((4096, 17.09), (8192, 30.34), (16384, 63.94), (32768, 110.66))
    ),
    # 3.01 TB/s
    Published("QuACK", "softmax", (16384, 131072), F32, H100, 2 * 16384 * 131072 * 4 / 3.01e6, QUACK),
    Published("NVIDIA, CuTe DSL", "RMS norm", (32768, 16384), BF16, B200, 329.54, CUTLASS),
    Published("Liger, CuTe DSL", "RMS norm", (8192, 4096), BF16, H100, 51.968, CUTE_LIGER),
    Published("Liger, CuTe DSL", "RMS norm", (8192, 4096), BF16, B200, 28.992, CUTE_LIGER),
    *(
        Published("TileOPs", "RMS norm", (2048, N), BF16, H200, us, TILEOPS)
        for N, us in ((4096, 12.2), (8192, 21.8), (16384, 43.0))
    ),
    *(Published("TileOPs", "layer norm", (2048, N), BF16, H200, us, TILEOPS) for N, us in ((8192, 26.5), (16384, 50.8))),
    Published("FlagGems", "softmax", (1048576, 1024), F32, H20, 2381.0, FLAGGEMS),
    Published("FlagGems", "softmax", (1048576, 1024), torch.float16, H20, 1718.0, FLAGGEMS),
    Published("FlagGems", "softmax", (4096, 4096), F32, H20, 47.0, FLAGGEMS),
)


def predicted(row: Published, others: dict[str, Any]) -> float:
    """Microseconds that the model says; of code that is not at hand, the floor."""
    if not row.compiled:
        return time_model.least_seconds(2 * row.nbytes, 0, row.gpu) * 1e6
    arch = str(time_model.CLOCKS[row.gpu.name].arch)
    return time_model.seconds(others["kernels"][row.label][arch], row.gpu) * 1e6


def ratios(others: dict[str, Any]) -> dict[Published, float]:
    """Predicted over published, of each row."""
    return {row: predicted(row, others) / row.microseconds for row in PUBLISHED}


def spread(values: list[float]) -> tuple[float, float, float]:
    """(least, geometric mean, largest)."""
    return min(values), math.exp(sum(map(math.log, values)) / len(values)), max(values)


# ---------------------------------------------------------------------------------------------- Liger's kernels
def case(row: Published) -> Case:
    """A row of Liger's as a case of the evidence."""
    return Case(row.label, row.dtype, False, _launches(row), {name: (row.nbytes, row.nbytes) for name in KERNELS})


KERNELS = ("liger_cross_entropy_kernel", "_layer_norm_forward_kernel", "_rms_norm_forward_kernel")


def _launches(row: Published) -> Callable[[], None]:
    def run() -> None:
        x = torch.empty(row.shape, dtype=row.dtype, device="meta")
        weight = torch.empty(row.shape[1], dtype=row.dtype, device="meta")
        if row.operation == "cross entropy":
            from liger_kernel.ops.cross_entropy import cross_entropy_forward

            target = torch.empty(row.shape[0], dtype=torch.int64, device="meta")
            with _values_of_meta_tensors(row.shape[0]):
                cross_entropy_forward(x.requires_grad_(), target, None, -100, 0.0, 0.0, "mean", None, False)
        elif row.operation == "layer norm":
            from liger_kernel.ops.layer_norm import layer_norm_forward

            layer_norm_forward(x, weight, weight, 1e-6)
        else:
            from liger_kernel.ops.rms_norm import rms_norm_forward

            rms_norm_forward(x, weight, 1e-6, 0.0, "llama", None)

    return run


@contextlib.contextmanager
def _values_of_meta_tensors(rows: int) -> Iterator[None]:
    """Liger asks how many targets count, and whether they are classes: all `rows`, and they are."""
    with (
        mock.patch.object(torch.Tensor, "item", return_value=rows),
        mock.patch.object(torch.Tensor, "__bool__", return_value=True),
    ):
        yield


def compiled_others() -> dict[str, Any]:
    """What others.json holds: findings of Liger's kernels, and the versions that they are of."""
    kernels = {row.label: {"90": examined(case(row), 90)[0]} for row in PUBLISHED if row.compiled}
    return {**{name: importlib.metadata.version(name) for name in ("liger-kernel", "triton")}, "kernels": kernels}


def others() -> dict[str, Any]:
    """What was compiled last."""
    return json.loads(FILE.read_text())
