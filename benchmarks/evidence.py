"""Evidence step 3: every plan compiled ahead of time, for parts that need not be there, and what the machine code says.

`cases()` lists launches that between them take every plan; each runs the library's own host code on `meta` tensors under a
stand-in driver. `make evidence` compiles all of them and writes evidence.json; the tests compile the heaviest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hw3gpu.kernels.gpu import batch_norm, cross_entropy, softmax

from .inside_triton import Launch, StandIn, machine_code

ARCHITECTURES: tuple[int | str, ...] = (80, 90, 100, 120, "gfx942")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
REGISTER_FILE = 65536
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FILE = Path(__file__).with_name("evidence.json")


@dataclass(frozen=True)
class Case:
    """One launch of the library: `run()` makes it."""

    name: str
    dtype: torch.dtype
    heavy: bool  # its plan's heaviest set of options: compiled by the tests, for every architecture
    run: Callable[[], None]

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        z = _meta(shape, dtype)
        softmax.forward(z, torch.empty_like(z))
        softmax.backward(z, z, torch.empty_like(z))

    return run


@dataclass(frozen=True)
class Loss:
    """Options of cross entropy that change what a thread keeps."""

    soft: bool = False
    smoothing: float = 0.0
    softcap: float | None = None
    more: bool = False  # class weights, z-loss, a denominator and all statistics of the rows


def _cross_entropy_case(
    shape: tuple[int, int, int], dtype: torch.dtype, loss: Loss, at_once: bool
) -> Callable[[], None]:  # fmt: skip
    def run() -> None:
        N, V, S = shape
        acc = _acc(dtype)
        z, dz = _meta(shape, dtype), _meta(shape, dtype)
        target = _meta(shape, dtype) if loss.soft else _meta((N, S), torch.int64)
        weight = _meta((V,), acc) if loss.more else None
        losses, stats = _meta((N, S), acc), _meta((5 if loss.more else 3, N, S), acc)
        one, invalid = _meta((1,), acc), _meta((1,), torch.int64)
        options: dict[str, Any] = {
            "ignore_index": -100, "label_smoothing": loss.smoothing, "z_loss": 1e-4 * loss.more, "softcap": loss.softcap
        }  # fmt: skip
        if at_once:
            extras: dict[str, Any] = {"stats": stats, "denominator": one} if loss.more else {}
            cross_entropy.forward_backward(z, target, weight, losses, dz, invalid, **extras, **options)
        else:
            cross_entropy.forward(z, target, weight, losses, stats, invalid, **options)
            cross_entropy.backward(z, target, weight, stats, one.expand(N, S), one, dz, **options)

    return run


def _reduce_case(rows: int, dtype: torch.dtype, soft: bool) -> Callable[[], None]:
    def run() -> None:
        acc = _acc(dtype)
        target = _meta((rows, 10, 1), dtype) if soft else _meta((rows, 1), torch.int64)
        one = _meta((1,), acc)
        cross_entropy.reduce(_meta((rows, 1), acc), target, _meta((10,), acc), one, one, ignore_index=-100)

    return run


def _batch_norm_case(shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool) -> Callable[[], None]:
    def run() -> None:
        N, C, S = shape
        acc = _acc(dtype)
        x = _meta((N, S, C), dtype).transpose(1, 2) if channels_last else _meta(shape, dtype)
        mean = _meta((2, C), acc)
        var, rstd, gamma, beta, running_mean, running_var, dgamma, dbeta = (_meta((C,), acc) for _ in range(8))
        batch_norm.forward(
            x, gamma, beta, torch.empty_like(x), mean, var, rstd, running_mean, running_var, eps=1e-5, momentum=0.1
        )  # fmt: skip
        batch_norm.backward(x, x, mean, rstd, gamma, torch.empty_like(x), dgamma, dbeta)
        batch_norm.normalize(x, mean, rstd, gamma, beta, torch.empty_like(x))
        batch_norm.inference_backward(x, x, mean, rstd, gamma, torch.empty_like(x), dgamma, dbeta)

    return run


ROWS = (
    (4096, 10, 1),
    (4096, 1000, 1),
    (4096, 1001, 1),
    (512, 8192, 1),
    (512, 8195, 1),
    (512, 16384, 1),
    (512, 16387, 1),
    (512, 16391, 1),
    (512, 32768, 1),
    (512, 32771, 1),
    (512, 32775, 1),
    (512, 50257, 1),
    (256, 65536, 1),
    (8, 21, 4096),
    (8, 1000, 512),
)
LOSSES = {
    "hard": Loss(),
    "hard, more": Loss(more=True),
    "hard, smoothing": Loss(smoothing=0.1),
    "hard, softcap": Loss(softcap=30.0),
    "hard, all": Loss(smoothing=0.1, softcap=30.0, more=True),
    "soft": Loss(soft=True),
    "soft, all": Loss(soft=True, smoothing=0.1, softcap=30.0, more=True),
}
F32, BF16 = torch.float32, torch.bfloat16
# the longest rows that each plan takes are its heaviest, with the most that its threads keep
HEAVY_ROWS = {
    ("softmax", 16387, F32),
    ("softmax", 16391, BF16),
    ("softmax", 32771, F32),
    ("softmax", 50257, BF16),
    ("hard, more", 32768, F32),
    ("hard, more", 32771, F32),
    ("hard, more", 32775, BF16),
    ("hard, more", 50257, F32),
    ("hard, more", 50257, BF16),
    ("hard, more", 65536, BF16),
    ("hard, softcap", 16387, F32),
    ("hard, smoothing", 16391, BF16),
    ("hard, smoothing", 50257, F32),
    ("soft", 16384, BF16),
    ("soft", 16387, F32),
    ("soft", 50257, F32),
    ("hard, all", 8195, F32),
    ("soft, all", 8195, F32),
    ("soft, all", 50257, F32),
}
HEAVY_STEPS = {("hard, all", 1001, F32), ("soft, all", 1001, BF16), ("hard, more", 32771, F32)}
# (shape, channels-last, heavy)
CHANNELS = (
    ((16, 3000, 4), False, False),
    ((64, 2048, 49), False, False),
    ((64, 512, 196), False, False),
    ((16, 256, 1024), False, True),
    ((32, 256, 3136), False, True),
    ((32, 64, 3136), False, False),
    ((8, 3, 262144), False, False),
    ((4096, 512, 1), False, False),
    ((64, 2048, 49), True, False),
    ((32, 64, 3136), True, True),
    ((8, 3, 262144), True, False),
)


def cases() -> Iterator[Case]:
    """Every plan and dtype; of the rows, with each set of options, loss and gradient at once and in two steps."""
    for dtype in DTYPES:
        for shape in ROWS:
            at = "x".join(map(str, shape))
            heavy = ("softmax", shape[1], dtype) in HEAVY_ROWS
            yield Case(f"softmax {at}", dtype, heavy, _softmax_case(shape, dtype))
            for name, loss in LOSSES.items():
                for at_once, how, heaviest in ((True, "at once", HEAVY_ROWS), (False, "in two steps", HEAVY_STEPS)):
                    heavy = (name, shape[1], dtype) in heaviest
                    label = f"cross entropy {how}, {name} {at}"
                    yield Case(label, dtype, heavy, _cross_entropy_case(shape, dtype, loss, at_once))
        for soft in (False, True):
            heavy = dtype == torch.float32 and not soft
            name = f"cross entropy, {'soft' if soft else 'hard'}, reduction"
            yield Case(name, dtype, heavy, _reduce_case(100_000, dtype, soft))
        for shape, channels_last, heavy in CHANNELS:
            at = "x".join(map(str, shape)) + (" channels-last" if channels_last else "")
            yield Case(
                f"batch norm {at}", dtype, heavy and dtype == torch.float32, _batch_norm_case(shape, dtype, channels_last)
            )


def compiled(case: Case, arch: int | str) -> list[Launch]:
    """The launches of `case`, compiled for `arch`."""
    with StandIn(arch) as device:
        case.run()
    return device.launches


def findings(launch: Launch, arch: int | str, dtype: torch.dtype) -> tuple[dict[str, Any], list[str]]:
    """What the machine code of a launch says, and what is wrong with it."""
    wrong = []
    if launch.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{launch.shared} bytes of shared memory, {SHARED_LIMIT[arch]} there are")
    if isinstance(arch, str):
        return {"warps": launch.num_warps, "shared": launch.shared}, wrong
    code = machine_code(launch.binary)
    if code.stack or code.local:
        wrong.append(f"spills: {code.stack} bytes of stack, {code.local} of local memory")
    if code.registers * launch.num_warps * 32 > REGISTER_FILE:
        wrong.append(f"{code.registers} registers x {launch.num_warps} warps")
    if code.doubles and dtype != torch.float64:
        wrong.append(f"{code.doubles} float64 instructions in a kernel for {dtype}")
    return {"warps": launch.num_warps, "shared": launch.shared, **asdict(code)}, wrong


def source_hash() -> str:
    """The hash of the kernels' sources and of this list of cases: evidence of other sources is stale."""
    folder = Path(batch_norm.__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.py")), Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def run(args: argparse.Namespace) -> int:
    """Compiles every case for every architecture, writes evidence.json, prints what is wrong; 1 if anything is."""
    from rich.console import Console
    from rich.progress import track

    console = Console()
    table: dict[str, Any] = {}
    wrong_ones = 0
    for case in track(list(cases()), description="compiling"):
        for arch in ARCHITECTURES:
            for launch in compiled(case, arch):
                found, wrong = findings(launch, arch, case.dtype)
                table.setdefault(case.label, {}).setdefault(str(arch), {})[launch.name] = found
                wrong_ones += len(wrong)
                for complaint in wrong:
                    console.print(f"{case.label}, {launch.name}, {arch}: {complaint}")
    file = Path(args.json or FILE)
    file.write_text(json.dumps({"sources": source_hash(), "kernels": table}, indent=0) + "\n")
    console.print(f"{len(table)} cases on {len(ARCHITECTURES)} architectures, {wrong_ones} complaints: {file.name}")
    return 1 if wrong_ones else 0
