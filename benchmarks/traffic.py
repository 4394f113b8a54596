"""`python -m benchmarks traffic`: what loss and gradient of cross entropy ask to move, beside Liger's kernel.

A pass is one read or one write of the logits' bytes, all launches together, counted by `ledger` in Triton's interpreter, after
the result has been held to the answer sheet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from hw3gpu import reference
from hw3gpu._cli.interpreter import mend_the_interpreter

from .harness import OURS, Bench, Task, bench
from .ledger import Ledger, ledger

ROWS = 3
SIZES = (1000, 1001, 16384, 32000, 50257, 65536, 131072)
DTYPES = (torch.float32, torch.bfloat16)
HARD: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0}


def _logits(V: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ROWS, V, generator=torch.Generator().manual_seed(V)).to(dtype)


def _at_once(V: int, dtype: torch.dtype, soft: bool) -> float:
    from hw3gpu.kernels.gpu import cross_entropy

    z = _logits(V, dtype)[:, :, None]
    target = torch.softmax(z.float(), 1).to(dtype) if soft else torch.arange(ROWS)[:, None]
    loss, dz, invalid = torch.empty(ROWS, 1), torch.empty_like(z), torch.full((1,), ROWS)
    tensors = {"z": z, "dz": dz} | ({"y": target} if soft else {})
    with ledger(**tensors) as book:
        cross_entropy.forward_backward(z, target, None, loss, dz, invalid, **HARD)
    return _verified(book, z, target, loss, dz, torch.ones(ROWS, 1))


def _in_two_steps(V: int, dtype: torch.dtype) -> float:
    from hw3gpu.kernels.gpu import cross_entropy

    z = _logits(V, dtype)[:, :, None]
    target, upstream = torch.arange(ROWS)[:, None], torch.randn(ROWS, 1)
    loss, stats, dz = torch.empty(ROWS, 1), torch.empty(3, ROWS, 1), torch.empty_like(z)
    invalid = torch.full((1,), ROWS)
    with ledger(z=z, dz=dz) as book:
        cross_entropy.forward(z, target, None, loss, stats, invalid, **HARD)
        cross_entropy.backward(z, target, None, stats, upstream, None, dz, **HARD)
    return _verified(book, z, target, loss, dz, upstream)


def _token_log_probs(V: int, dtype: torch.dtype) -> float:
    """-log p is the loss here, and its gradient that of log p for the upstream gradient of the other sign."""
    from hw3gpu.kernels.gpu import token_log_probs

    z = _logits(V, dtype)[:, :, None]
    target, upstream, zeros = torch.arange(ROWS)[:, None], torch.randn(ROWS, 1), torch.zeros(ROWS, 1)
    log_prob, entropy, lse, sums, dz = *(torch.empty(ROWS, 1) for _ in range(3)), torch.empty(4, ROWS, 1), torch.empty_like(z)
    options: dict[str, Any] = {"ignore_index": -100, "temperature": 1.0}
    with ledger(z=z, dz=dz) as book:
        token_log_probs.forward(z, target, log_prob, entropy, lse, sums, torch.full((1,), ROWS), **options)
        token_log_probs.backward(z, target, sums, -upstream, zeros, zeros, dz, **options)
    return _verified(book, z, target, -log_prob, dz, upstream)


def _distillation(V: int, dtype: torch.dtype) -> float:
    """Two tensors of logits are read, and the student's gradient is written: the floor is 5."""
    from hw3gpu.kernels.gpu import distillation

    student = _logits(V, dtype)[:, :, None]
    teacher, dstudent = student.roll(1, 0), torch.empty_like(student)
    loss, sums, upstream = torch.empty(ROWS, 1), torch.empty(8, ROWS, 1), torch.randn(ROWS, 1)
    options: dict[str, Any] = {"kind": "forward", "beta": 0.5, "temperature": 1.0}
    with ledger(student=student, teacher=teacher, dstudent=dstudent) as book:
        distillation.forward(student, teacher, None, loss, sums, **options)
        distillation.backward(student, teacher, None, sums, upstream, dstudent, None, **options)
    sheet = reference.distillation_loss(
        _numbers(student), _numbers(teacher), reduction="none", upstream=upstream[:, 0].double().numpy()
    )
    _right(dtype, (loss[:, 0], sheet.loss), (dstudent[..., 0], sheet.dstudent))
    return sum(book.asked.values()) / (student.numel() * student.element_size())


def _liger(V: int, dtype: torch.dtype, upstream: float) -> float:
    from liger_kernel.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward

    z = _logits(V, dtype)
    x = z.clone().requires_grad_()  # its gradient is written over it
    target = torch.arange(ROWS)
    with ledger(z=x.detach()) as book:
        loss, *_, dz = cross_entropy_forward(x.detach().requires_grad_(), target, None, -100, 0.0, 0.0, "sum", None, False)
        dz = cross_entropy_backward(dz, torch.tensor(upstream))
    return _verified(book, z[:, :, None], target[:, None], loss, dz.detach()[:, :, None], torch.full((ROWS, 1), upstream))


def _numbers(t: torch.Tensor) -> np.ndarray:
    return t[..., 0].double().numpy()


def _right(dtype: torch.dtype, *pairs: tuple[torch.Tensor, np.ndarray]) -> None:
    """AssertionError unless the results are the answer sheet's, to the rounding of `dtype`."""
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for found, sheet in pairs:
        torch.testing.assert_close(found.double(), torch.as_tensor(sheet), rtol=rtol, atol=1e-4)


def _verified(
    book: Ledger, z: torch.Tensor, target: torch.Tensor, loss: torch.Tensor, dz: torch.Tensor, upstream: torch.Tensor
) -> float:
    """Passes, after the result has been held to the answer sheet: what is wrong is not counted."""
    y = _numbers(target) if target.dim() == 3 else target[:, 0].numpy()
    sheet = reference.cross_entropy_with_options(_numbers(z), y, reduction="none", upstream=upstream[:, 0].double().numpy())
    _right(z.dtype, (loss.sum(), np.asarray(sheet.loss.sum())), (dz[..., 0], sheet.dlogits))
    return sum(book.asked.values()) / (z.numel() * z.element_size())


Count = Callable[[int, torch.dtype], float]
# what is counted, for whom, and the passes that no kernel can do without
COUNTS: dict[str, tuple[float, dict[str, Count]]] = {
    "loss and gradient at once": (2, {OURS: partial(_at_once, soft=False)}),
    "forward, backward, upstream 1": (3, {OURS: _in_two_steps, "Liger": partial(_liger, upstream=1.0)}),
    "forward, backward, any upstream": (3, {OURS: _in_two_steps, "Liger": partial(_liger, upstream=2.0)}),
    "soft targets, at once": (3, {OURS: partial(_at_once, soft=True)}),
    "log-probability, entropy and lse": (3, {OURS: _token_log_probs}),
    "KL of teacher and student": (5, {OURS: _distillation}),
}


def measure(V: int, dtype: torch.dtype, run: Bench) -> None:
    """All of COUNTS for logits (ROWS, V); what is not installed is a note."""
    name = str(dtype).removeprefix("torch.")
    for what, (least, counts) in COUNTS.items():
        head = {"row": f"V = {V}, {name}", "operation": "cross entropy", "shape": f"{ROWS}x{V}", "dtype": name, "pass": what}
        for contestant, count in counts.items():
            line: dict[str, Any] = {**head, "contestant": contestant, "least_passes": least}
            line["bytes"] = int(least * ROWS * V * dtype.itemsize)
            try:
                line |= {"passes": round(count(V, dtype), 2), "right": "yes"}
            except ImportError as error:
                line["note"] = f"not installed ({error})"
            except AssertionError as error:
                run.wrong += contestant == OURS
                line |= {"right": "no", "note": f"wrong: {' '.join(str(error).split())}"}
            run.results.add([line])


def tasks() -> list[Task]:
    return [(f"V = {V}, {str(dtype).removeprefix('torch.')}", partial(measure, V, dtype)) for dtype in DTYPES for V in SIZES]


def run(args: argparse.Namespace) -> int:
    mend_the_interpreter()
    with np.errstate(all="ignore"):  # of the interpreter's arithmetic
        return bench(args, tasks(), rows=ROWS)
