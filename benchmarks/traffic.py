"""`python -m benchmarks traffic`: what loss and gradient of cross entropy ask to move, beside Liger's kernel.

A pass is one read or one write of the logits' bytes, all launches together, counted by `ledger` in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hw3gpu._cli.interpreter import mend_the_interpreter

from .ledger import Ledger, ledger

ROWS = 3
SIZES = (1000, 1001, 16384, 32000, 50257, 65536, 131072)
DTYPES = (torch.float32, torch.bfloat16)
HARD: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0}
COLUMNS = (
    "hw3gpu, loss and gradient at once",
    "hw3gpu, forward, backward, any upstream",
    "hw3gpu, soft targets, at once",
    "hw3gpu, log-probability, entropy and lse, forward, backward",
    "hw3gpu, KL of teacher and student, forward, backward",
    "Liger, upstream 1",
    "Liger, upstream not 1",
)


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
    x = student[..., 0].double().requires_grad_()
    log_q, log_p = torch.log_softmax(x, 1), torch.log_softmax(teacher[..., 0].double(), 1)
    losses = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    (gradient,) = torch.autograd.grad(losses, x, upstream[:, 0].double())
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(loss[:, 0].double(), losses.detach(), rtol=rtol, atol=1e-4)
    torch.testing.assert_close(dstudent[..., 0].double(), gradient, rtol=rtol, atol=1e-4)
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


def _verified(
    book: Ledger, z: torch.Tensor, target: torch.Tensor, loss: torch.Tensor, dz: torch.Tensor, upstream: torch.Tensor
) -> float:
    """Passes, after the result has been held to float64: what is wrong is not counted."""
    x = z[..., 0].double().requires_grad_()
    y = target[..., 0].double() if target.dim() == 3 else target[:, 0]
    losses = torch.nn.functional.cross_entropy(x, y, reduction="none")
    (gradient,) = torch.autograd.grad(losses, x, upstream[:, 0].double())
    rtol = 2e-2 if z.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(loss.double().sum(), losses.detach().sum(), rtol=rtol, atol=1e-4)
    torch.testing.assert_close(dz[..., 0].double(), gradient, rtol=rtol, atol=1e-4)
    return sum(book.asked.values()) / (z.numel() * z.element_size())


def measure() -> dict[str, dict[str, float]]:
    """Passes by row ("V = 1000, float32") and column of the table."""
    table = {}
    for dtype in DTYPES:
        for V in SIZES:
            counts: tuple[Callable[[], float], ...] = (
                partial(_at_once, V, dtype, soft=False),
                partial(_in_two_steps, V, dtype),
                partial(_at_once, V, dtype, soft=True),
                partial(_token_log_probs, V, dtype),
                partial(_distillation, V, dtype),
                partial(_liger, V, dtype, 1.0),
                partial(_liger, V, dtype, 2.0),
            )
            row = f"V = {V}, {str(dtype).removeprefix('torch.')}"
            table[row] = {column: round(count(), 2) for column, count in zip(COLUMNS, counts, strict=True)}
    return table


def run(args: argparse.Namespace) -> int:
    """Prints the table; writes it to `args.json` where that is given."""
    from rich.console import Console
    from rich.table import Table

    mend_the_interpreter()
    found = measure()
    table = Table("passes", *COLUMNS, title=f"Bytes asked for / bytes of the logits, {ROWS} rows, in Triton's interpreter")
    for row, counts in found.items():
        table.add_row(row, *(f"{counts[column]:.2f}" for column in COLUMNS))
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0
