"""An operation on one shape, its inputs, who takes part, and the bytes it has to move; and the rows of `gpu`.

Those of `cpu` are in `cpu_cases`. The most valuable rows come first. Bytes are those that the operation cannot do without
(`call_cases.Call.least`): what has to be read twice counts twice as far as L2 cannot keep it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu.kernels.gpu.device import Device

from . import training_losses
from .call_cases import Call
from .cuda_clock import Step
from .time_model import CACHE_KEPT

SEED = 20240229
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Row:
    """An operation on one shape. shape: (N, C, H, W), (rows, classes), (rows, width, classes) or (stack, m, m)."""

    operation: str  # of `_OF`, or 'minimize_trace'
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    channels_last: bool = False
    fused: bool = False  # batch norm with a residual and ReLU
    soft: bool = False  # targets are probabilities
    gradient: str = "backward"  # of cross entropy: where it is made
    statistics: str = "of the batch"  # of batch norm; or "evaluation", forward alone, or "frozen", forward and backward
    kind: str = ""  # of distillation
    k: int = 1  # of minimize_trace

    @property
    def name(self) -> str:
        notes = [
            ("channels-last", self.channels_last),
            ("residual and ReLU", self.fused),
            ("soft targets", self.soft),
            ("gradient=forward", self.gradient == "forward"),
            (self.statistics, self.statistics != "of the batch"),
            (training_losses.KINDS.get(self.kind, ""), self.kind),
            (f"k = {self.k}", self.operation == "minimize_trace"),
        ]
        of_shape = f"{self.operation} {'x'.join(map(str, self.shape))} {self.dtype_name}"
        return ", ".join([of_shape, *(note for note, there in notes if there)])

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def call(self) -> Call | None:
        """The case of the evidence, as which its time is predicted, if it could be one."""
        if self.soft or self.statistics != "of the batch" or self.operation not in ("batch norm", "cross entropy", "softmax"):
            return None
        options = ((self.channels_last, "channels-last"), (self.fused, "residual and ReLU"),
                   (self.gradient == "forward", 'gradient="forward"'), (True, ""))  # fmt: skip
        return Call(self.operation, self.shape, self.dtype, next(option for there, option in options if there))

    def nbytes(self, device: Device) -> dict[str, float]:
        """Bytes that forward and backward cannot do without; 0 where nobody has counted them."""
        size = math.prod(self.shape) * self.dtype.itemsize
        two = {"forward": (2 * size, 0), "backward": (3 * size, 0)}  # tensors are read
        one = {"forward": (size, 0), "backward": (2 * size, 0)}
        counted = {"distillation": two, "token log-probabilities": one} | ({self.operation: two} if self.soft else {})
        least = self.call.least if self.call else counted.get(self.operation, dict.fromkeys(two, (0, 0)))
        return {of: once + max(again - CACHE_KEPT * device.l2, 0.0) for of, (once, again) in least.items()}


# ---------------------------------------------------------------------------------------------- the table
def _norms(shapes: Iterable[tuple[int, int, int]], batch: int, dtype: torch.dtype, **options: Any) -> list[Row]:
    """(channels, side, side) of ResNet-50's batch norms."""
    return [Row("batch norm", (batch, *shape), dtype, **options) for shape in shapes]


TABLE = (
    Row("batch norm", (32, 256, 56, 56)),
    Row("cross entropy", (8192, 32000), BF16),
    Row("batch norm", (128, 256, 56, 56), BF16),
    Row("cross entropy", (8192, 128256), BF16, gradient="forward"),
    Row("batch norm", (128, 64, 56, 56), BF16, channels_last=True),
    Row("cross entropy", (4096, 50257), BF16),
    Row("batch norm", (128, 256, 56, 56), BF16, fused=True),
    Row("softmax", (8192, 32000), BF16),
    Row("batch norm", (128, 512, 28, 28), BF16),
    Row("cross entropy", (8192, 128256), BF16),
    Row("batch norm", (32, 1024, 14, 14), BF16),
    Row("batch norm", (128, 2048, 7, 7)),
    Row("batch norm", (32, 64, 112, 112)),
)
NEIGHBOURS = (
    Row("cross entropy", (8192, 32000)),
    Row("cross entropy", (4096, 1000)),
    Row("cross entropy", (2048, 32000), BF16, soft=True),
    Row("linear cross entropy", (4096, 2048, 32000), BF16),
    Row("softmax", (4096, 1000)),
    Row("batch norm", (16, 8, 4, 4)),
    Row("cross entropy", (32, 10)),
    Row("minimize_trace", (1, 1024, 1024), torch.float64, k=8),
    Row("minimize_trace", (256, 64, 64), torch.float64, k=1),
    Row("cross entropy", (8192, 32000), BF16, gradient="forward"),
    *_norms([(256, 56, 56), (1024, 14, 14)], 32, F32, channels_last=True),
    *_norms([(64, 56, 56), (128, 28, 28), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)], 32, F32),
    *_norms([(64, 112, 112), (64, 56, 56), (1024, 14, 14), (2048, 7, 7)], 128, BF16),
    *_norms([(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)], 128, BF16, channels_last=True),
    Row("token log-probabilities", (8192, 128256), BF16),
    Row("distillation", (8192, 32000), BF16, kind="forward"),
    Row("distillation", (8192, 32000), BF16, kind="jensen_shannon"),
    Row("linear token log-probabilities", (4096, 2048, 32000), BF16),
    Row("linear distillation", (4096, 2048, 32000), BF16, kind="jensen_shannon"),
    Row("cross entropy", (8192, 50257), F16),
    Row("softmax", (8192, 50257), BF16),
    Row("softmax", (8192, 128256)),
    Row("cross entropy", (4096, 151936), BF16),
    Row("minimize_trace", (1, 2048, 2048), torch.float64, k=8),
)
ROWS = (*TABLE, *NEIGHBOURS)


# ---------------------------------------------------------------------------------------------- inputs
@dataclass
class Inputs:
    """Tensors of one row; `leaves` are what it is differentiated by."""

    x: torch.Tensor
    target: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    running: tuple[torch.Tensor, ...] = ()  # mean and variance
    upstream: torch.Tensor = field(default_factory=lambda: torch.ones(()))
    teacher: tuple[torch.Tensor, ...] = ()  # of distillation: logits, or hidden states and weight

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in (self.x, self.weight, self.bias, self.residual) if t is not None and t.requires_grad)


def inputs(row: Row, device: str) -> Inputs:
    """The row's, from the generator of SEED."""
    random = None if device == "meta" else torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int, dtype: torch.dtype = row.dtype) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if row.channels_last else x
        return x.normal_(generator=random)

    def classes(rows: int, of: int) -> torch.Tensor:
        return torch.arange(rows, device=device) * 7919 % of

    if row.operation == "batch norm":
        C = row.shape[1]
        weight, bias = (torch.linspace(0.5, end, C, device=device).requires_grad_() for end in (1.5, 1.0))
        residual = normal(*row.shape).requires_grad_() if row.fused else None
        running = tuple(torch.linspace(first, 2, C, device=device) for first in (-1, 0.5))
        return Inputs(normal(*row.shape).requires_grad_(), None, weight, bias, residual, running, normal(*row.shape))
    if row.operation == "minimize_trace":
        x = normal(row.shape[0], 2 * row.shape[1], row.shape[1])
        return Inputs((x.mT @ x / x.shape[1]).squeeze(0))
    x = normal(*row.shape[:2]).requires_grad_()
    one = torch.ones((), dtype=row.dtype, device=device)
    if row.operation.startswith("linear"):
        rows, width, of = row.shape
        weight = (normal(of, width) / width**0.5).requires_grad_()
        teacher = (normal(rows, width), normal(of, width) / width**0.5) if row.kind else ()
        return Inputs(x, classes(rows, of), weight, upstream=one, teacher=teacher)
    if row.operation == "distillation":
        return Inputs(x, upstream=one, teacher=(normal(*row.shape),))
    if row.operation == "softmax":
        return Inputs(x, upstream=normal(*row.shape))
    target = normal(*row.shape).softmax(1) if row.soft else classes(*row.shape)
    return Inputs(x, target, upstream=one)


# ---------------------------------------------------------------------------------------------- who takes part
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for one shape; what cannot be compiled as a whole raises.

    A backward that is called again for the same result, as `Clock` does, may not give its buffers away.
    """
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)


Make = Callable[[], Step]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def contestants(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    """What makes the step of each; hw3gpu first. Making one may fail for it alone: a package that is missing, no memory."""
    return _OF[row.operation](row, given, compiled)


def _batch_norms(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    training = row.statistics == "of the batch"

    def step(function: Callable[..., torch.Tensor]) -> Step:
        running = (t.clone() for t in given.running)  # that of another one is not written
        call = partial(function, given.x, *running, given.weight, given.bias, given.residual)
        return Step(call, given.leaves, given.upstream)

    def ours(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        more = {"residual": residual, "activation": "relu"} if row.fused else {}
        return HF.batch_norm(x, running_mean, running_var, weight, bias, training=training, **more)

    def eager(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training=training)
        return F.relu(y + residual) if row.fused else y

    def without_cudnn(*args: Any) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return eager(*args)

    def cudnn(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
        y = torch.cudnn_batch_norm(x, weight, bias, running_mean, running_var, True, 0.1, 1e-5)[0]
        return F.relu(y + residual) if row.fused else y

    return {
        "hw3gpu": lambda: step(ours),
        "eager": lambda: step(eager),
        "compiled": lambda: step(compiled(eager)),
        "cuDNN": lambda: step(cudnn),
        "eager, cuDNN off": lambda: step(without_cudnn),
    }


def _cross_entropies(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    def step(function: Callable[..., torch.Tensor], x: torch.Tensor | None = None, **options: Any) -> Step:
        x = given.x if x is None else x
        return Step(partial(function, x, given.target, **options), (x,), given.upstream)

    def liger() -> Step:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # it writes the gradient over the logits: its own copy
        return step(liger_cross_entropy, given.x.detach().clone().requires_grad_())

    found: dict[str, Make] = {
        "hw3gpu": lambda: step(HF.cross_entropy, gradient=row.gradient),
        "eager": lambda: step(F.cross_entropy),
        "compiled": lambda: step(compiled(F.cross_entropy)),
    }
    return found if row.soft else found | {"Liger": liger}


def _softmaxes(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    def step(function: Callable[..., torch.Tensor], *args: Any) -> Step:
        return Step(partial(function, given.x, *args), (given.x,), given.upstream)

    def liger() -> Step:
        from liger_kernel.transformers.functional import liger_softmax

        return step(liger_softmax)

    return {
        "hw3gpu": lambda: step(HF.softmax, 1),
        "eager": lambda: step(F.softmax, 1),
        "compiled": lambda: step(compiled(F.softmax), 1),
        "Liger": liger,
    }


def _linear_cross_entropies(row: Row, given: Inputs, compiled: Compile) -> dict[str, Make]:
    def step(function: Callable[..., torch.Tensor]) -> Step:
        return Step(partial(function, given.x, given.weight, given.target), given.leaves, given.upstream)

    def eager(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def liger() -> Step:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return step(liger_fused_linear_cross_entropy)

    return {
        "hw3gpu": lambda: step(HF.linear_cross_entropy),
        "eager": lambda: step(eager),
        "compiled": lambda: step(compiled(eager)),
        "Liger": liger,
    }


_OF: dict[str, Callable[[Row, Inputs, Compile], dict[str, Make]]] = {
    "batch norm": _batch_norms,
    "cross entropy": _cross_entropies,
    "softmax": _softmaxes,
    "linear cross entropy": _linear_cross_entropies,
    "token log-probabilities": training_losses.token_log_probs,
    "linear token log-probabilities": training_losses.linear_token_log_probs,
    "distillation": training_losses.distillation,
    "linear distillation": training_losses.linear_distillation,
}


def solvers(row: Row, given: Inputs) -> dict[str, Callable[[], Any]]:
    """What solves the row's eigenproblem: no backward, and the host takes part, so that there is no graph of it."""

    def cupys() -> Any:
        import cupy

        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            return cupy.linalg.eigh(cupy.from_dlpack(given.x))

    return {
        "hw3gpu": lambda: hw3gpu.minimize_trace(given.x, row.k),
        "hw3gpu, not certified": lambda: hw3gpu.minimize_trace(given.x, row.k, certify=False),
        "torch eigh": lambda: torch.linalg.eigh(given.x),
        "CuPy eigh": cupys,
    }
