"""`python -m benchmarks products`: the products of linear cross entropy, counted on meta tensors as for an H100.

A forward and a backward pass run at the sizes of published models. Nothing is computed: PyTorch's operations give shapes alone,
and the launchers' kernels are noted and not compiled. What is counted is what a GPU would be asked for. The times are
predictions from NVIDIA's data sheet: nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import hw3gpu.functional as HF
from hw3gpu._core.torch_internals import DispatchMode
from hw3gpu._torch import linear_chunks, operators
from hw3gpu.kernels.gpu import cross_entropy, distillation, token_log_probs
from hw3gpu.kernels.gpu.device import H100
from hw3gpu.kernels.gpu.launch import _seen

from .evidence.compile_without_gpu import StandIn

RATE = 989.4e12  # bfloat16 operations a second of an H100 SXM, dense, by its data sheet
ROWS = 4096
PRODUCTS = ("mm", "addmm", "addmm_")


class Model(NamedTuple):
    """The head of a published model: V classes, D features, and the softcap of its logits."""

    name: str
    V: int
    D: int
    softcap: float | None = None


MODELS = (
    Model("GPT-2", 50257, 768),
    Model("Llama-3 8B", 128256, 4096),
    Model("Llama-3 70B", 128256, 8192),
    Model("Gemma-2 27B", 256000, 4608, 30.0),
    Model("DeepSeek-V3", 129280, 7168),
)


class Product(NamedTuple):
    """(m, k) times (k, n). alignment: the largest power of two, up to 512, of the bytes at which every matrix, and each of its
    rows, begins. nbytes: of the matrices, and of the sums that are read."""

    m: int
    k: int
    n: int
    alignment: int
    nbytes: int

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n

    @property
    def seconds(self) -> float:
        """Predicted: at the published rate, or at the bandwidth where that takes longer."""
        return max(self.operations / RATE, self.nbytes / H100.bandwidth)


@dataclass
class Counted(DispatchMode):
    """What PyTorch and the kernels are asked for inside. elementwise_bytes: of PyTorch's other operations, read and written.
    peak: bytes of all tensors that were made and live together."""

    products: list[Product] = field(default_factory=list)
    kernel_bytes: int = 0
    elementwise_bytes: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        self._keep((*args, *given.values()), counts=False)  # what others have made
        result = func(*args, **given)
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.products.append(_product(name, args, given, result))
        elif not func.is_view and "empty" not in name:
            self.elementwise_bytes += sum(t.nbytes for t in (*args, result) if isinstance(t, torch.Tensor))
        self._keep(result if isinstance(result, (tuple, list)) else (result,), counts=True)
        return result

    def _keep(self, values: Sequence[Any], counts: bool) -> None:
        for storage in (v.untyped_storage() for v in values if isinstance(v, torch.Tensor)):
            if id(storage) not in self._alive:
                self._alive[id(storage)] = storage.nbytes() * counts
                weakref.finalize(storage, self._alive.pop, id(storage), None)
        self.peak = max(self.peak, sum(self._alive.values()))

    def launched(self, kernel: Any, programs: int, *args: Any, plan: Any = None, reads: Any = (), writes: Any = (),
                 again: float = 0.0, **constants: Any) -> None:  # fmt: skip
        """In the place of `launch`."""
        *_, read, written = _seen(kernel, plan, programs, args, reads, writes, again)
        self.kernel_bytes += sum(nbytes for _, nbytes, _ in (*read, *written))


def _product(name: str, args: Any, given: dict[str, Any], result: torch.Tensor) -> Product:
    added, (a, b) = (None, args[:2]) if name == "mm" else (args[0], args[1:3])
    nbytes = sum(t.nbytes for t in (a, b, result)) + (added.nbytes if added is not None and given.get("beta", 1) else 0)
    alignment = min(_alignment(t) for t in (a, b, result))
    return Product(a.shape[0], a.shape[1], b.shape[1], alignment, nbytes)


def _alignment(matrix: torch.Tensor) -> int:
    begins = (matrix.storage_offset(), *(stride for stride in matrix.stride() if stride != 1))
    return math.gcd(512, *(int(at) * matrix.element_size() for at in begins))


@contextmanager
def counted() -> Iterator[Counted]:
    """Inside, calls on meta tensors are counted; they take the way of CUDA tensors."""
    book = Counted()
    with contextlib.ExitStack() as patches:
        for launchers in (cross_entropy, token_log_probs, distillation):
            patches.enter_context(mock.patch.object(launchers, "launch", book.launched))
        patches.enter_context(StandIn(90))
        patches.enter_context(mock.patch.object(operators, "traced", return_value=False))  # a dispatch mode would be a tracer
        patches.enter_context(book)
        yield book


@dataclass(frozen=True)
class Line:
    """What a training step of `linear_cross_entropy` asks for, of ROWS rows in bfloat16.

    in_slices: products where none adds to float32. peak, logits: GB that are made and alive together, and of all logits. rest:
    what of the peak is not gradients and one float32 gradient of the weight, as a share of the logits. Times in milliseconds,
    predicted; `floor`: three products of all rows at the published rate, and nothing else.
    """

    model: str
    chunks: int
    rows: int
    products: int
    in_slices: int
    alignment: int
    peak: float
    logits: float
    rest: float
    loss_passes: float
    floor: float
    of_products: float
    of_loss: float
    of_rest: float

    @property
    def predicted(self) -> float:
        return self.of_products + self.of_loss + self.of_rest


def step(model: Model, rows: int = ROWS) -> Counted:
    """Forward and backward, counted."""
    x, W = (torch.empty(n, model.D, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (rows, model.V))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    with counted() as book:
        HF.linear_cross_entropy(x, W, target, softcap=model.softcap).backward()
    return book


def line(model: Model) -> Line:
    """The step of a model, as PyTorch for CUDA makes it; and its products where these cannot add to float32."""
    book = step(model)
    with mock.patch.object(linear_chunks, "sums_in_float32", return_value=False):
        in_slices = len(step(model).products)
    logits, of_W = 2 * ROWS * model.V, 2 * model.V * model.D
    owned = 2 * ROWS * model.D + 3 * of_W
    return Line(
        model.name,
        sum(p.n == model.V for p in book.products),
        max(p.m for p in book.products if p.n == model.V),
        len(book.products),
        in_slices,
        min(p.alignment for p in book.products),
        book.peak / 1e9,
        logits / 1e9,
        (book.peak - owned) / logits,
        book.kernel_bytes / logits,
        1e3 * 6 * ROWS * model.V * model.D / RATE,
        1e3 * sum(p.seconds for p in book.products),
        1e3 * book.kernel_bytes / H100.bandwidth,
        1e3 * book.elementwise_bytes / H100.bandwidth,
    )


def table() -> list[str]:
    """The table of docs/gpu.md, a line of text each."""
    head = ("model, (V, D)", "chunks × rows", "products", "without `out_dtype`", "peak, GB", "logits, GB",
            "floor, ms", "products, ms", "loss kernel, ms", "gradients rounded and scaled, ms", "together, ms")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for model in MODELS:
        of = line(model)
        times = (of.floor, of.of_products, of.of_loss, of.of_rest, of.predicted)
        lines.append((
            f"{of.model}, ({model.V}, {model.D})", f"{of.chunks} × {of.rows}", str(of.products), str(of.in_slices),
            f"{of.peak:.2f}", f"{of.logits:.2f}", *(f"{ms:.2f}" for ms in times),
        ))  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in lines]


def run(args: argparse.Namespace) -> int:
    """Prints the table, and writes its figures to `args.json` where that is given."""
    print("\n".join(table()))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(line(model)) for model in MODELS], indent=1) + "\n")
    return 0
