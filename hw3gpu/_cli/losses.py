"""S7 further: the losses of `hw3gpu.functional` that read a softmax with their gradients, as `hw3gpu verify` runs them.

Of the linear ones logits are rounded products. With e the bound of a logit's rounding, the largest of its row, a number f of
the row moves by at most e Σ |∂f/∂z|, log p by 2e, so p by a share of 2e, and in first order

    |δ(p - 1_t)| ≤ 2 e p,   |δ(q - p)| ≤ 2 e_q q + 2 e_p p,   |δ(dz W)| ≤ |δ dz| |W|,   |δ(dzᵀ x)| ≤ |δ dz|ᵀ |x|

in addition to what the sums round. Half of each is added for the higher orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import _error_bounds, reference
from .._core import arrays
from .arrays import Place, to_numpy, to_torch
from .operations import Operation, Output, inputs_of_rows, random

TEMPERATURE = 0.75
UPSTREAM = (1.0, -0.25, 0.5)  # of log_prob, entropy and lse
ROUNDED = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
MORE = 1.5  # of a bound in first order


def _classes(what: str, rows: int, V: int) -> np.ndarray:
    """The last of the classes, which no input masks; where one is certain, that one."""
    return np.arange(rows) if what == "p -> 1" else V - 1 - np.arange(rows) % 5


def token_log_probs(place: Place, dtype: str) -> Iterator[Output]:
    """Log-probability, entropy and lse of every row, and one gradient for upstream gradients of all three."""
    import torch

    from .. import functional

    for what, values in inputs_of_rows(dtype):
        classes = _classes(what, *values.shape)
        z, target = place.array(values, dtype).requires_grad_(), place.array(classes, "int64")
        found = functional.token_log_probs(z, target, temperature=TEMPERATURE)
        (dz,) = torch.autograd.grad(_weighted(found), z)
        given = to_numpy(z), classes, TEMPERATURE
        sheet = reference.token_log_probs(*given, upstream=UPSTREAM)
        bound = _error_bounds.token_log_probs(*given, upstream=UPSTREAM, dtype=arrays.accumulate_dtype(z))
        leaf = to_torch(z).requires_grad_()
        theirs = _torch_token_log_probs(leaf, target)
        (their_dz,) = torch.autograd.grad(_weighted(theirs), leaf)
        for name, ours, torchs in zip(sheet._fields, (*found, dz), (*theirs, their_dz), strict=True):
            yield Output(f"{name} {what}", ours, getattr(sheet, name), torchs, getattr(bound, name))


def _weighted(rows: Any) -> Any:
    return sum(g * v.sum() for g, v in zip(UPSTREAM, rows, strict=True))


def _torch_token_log_probs(z: Any, target: Any) -> tuple[Any, Any, Any]:
    import torch

    log_p = torch.log_softmax(z / TEMPERATURE, -1)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    return log_p.gather(-1, target[:, None])[:, 0], entropy, torch.logsumexp(z / TEMPERATURE, -1)


def distillation_loss(place: Place, dtype: str) -> Iterator[Output]:
    """The three divergences of every row, and the gradients of student and teacher."""
    import torch

    from .. import functional

    rng = random()
    for what, values in inputs_of_rows(dtype):
        student = place.array(values, dtype).requires_grad_()
        teacher = place.array(values + 0.5 * rng.standard_normal(values.shape), dtype).requires_grad_()
        for kind in ("forward", "reverse", "jensen_shannon"):
            options: dict[str, Any] = {"temperature": TEMPERATURE, "kind": kind, "reduction": "none"}
            loss = functional.distillation_loss(student, teacher, **options)
            found = loss, *torch.autograd.grad(loss.sum(), (student, teacher))
            given = to_numpy(student), to_numpy(teacher)
            sheet = reference.distillation_loss(*given, **options)
            bound = _error_bounds.distillation_loss(*given, **options, dtype=arrays.accumulate_dtype(student))
            leaves = tuple(to_torch(z).requires_grad_() for z in (student, teacher))
            their_loss = _torch_divergence(leaves[0], leaves[1], kind)
            theirs = their_loss, *torch.autograd.grad(their_loss.sum(), leaves)
            for name, ours, torchs in zip(sheet._fields, found, theirs, strict=True):
                yield Output(f"{name} {kind}, {what}", ours, getattr(sheet, name), torchs, getattr(bound, name))


def _torch_divergence(student: Any, teacher: Any, kind: str) -> Any:
    import torch
    from torch.nn.functional import kl_div

    log_q, log_p = (torch.log_softmax(z / TEMPERATURE, -1) for z in (student, teacher))

    def divergence(target: Any, of: Any) -> Any:
        return kl_div(of, target, reduction="none", log_target=True).sum(-1)

    if kind != "jensen_shannon":
        return divergence(log_p, log_q) if kind == "forward" else divergence(log_q, log_p)
    mixture = torch.logsumexp(torch.stack([log_q, log_p]), 0) - np.log(2.0)
    return (divergence(log_p, mixture) + divergence(log_q, mixture)) / 2


# ---------------------------------------------------------------------------------------------- of x Wᵀ
class _Head(NamedTuple):
    """Hidden states and the weight, as rounded; their product in float64, and what rounding may do to a logit of each row."""

    x: Any
    W: Any
    z: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, place: Place, dtype: str, rng: np.random.Generator, width: int) -> _Head:
        x, W = (place.array(rng.standard_normal((n, width)) / n**0.25, dtype).requires_grad_() for n in (24, 300))
        exact, magnitude = to_numpy(x) @ to_numpy(W).T, abs(to_numpy(x)) @ abs(to_numpy(W)).T
        of_sum = _error_bounds.sum_of_products(magnitude, width, dtype=arrays.accumulate_dtype(x))
        return cls(x, W, exact, (of_sum + ROUNDED[dtype] * abs(exact)).max(1, keepdims=True))

    def gradients(self, dz: np.ndarray, error: np.ndarray, dtype: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(name, gradient, bound) of x and W. error: of dz before it is rounded."""
        acc, rounded = arrays.accumulate_dtype(self.x), ROUNDED[dtype]
        x, W, error = to_numpy(self.x), to_numpy(self.W), error + rounded * abs(dz)
        of_x, of_W = abs(dz) @ abs(W), abs(dz).T @ abs(x)
        dx = error @ abs(W) + _error_bounds.sum_of_products(of_x, len(W), dtype=acc)
        dW = error.T @ abs(x) + _error_bounds.sum_of_products(of_W, len(x), dtype=acc) + rounded * of_W  # products of some rows
        return [("dx", dz @ W, dx), ("dW", dz.T @ x, dW)]


def linear_token_log_probs(place: Place, dtype: str) -> Iterator[Output]:
    """The numbers of every row of x Wᵀ, in chunks, and the gradients of x and W for log_prob."""
    import torch

    from .. import functional

    head = _Head.of(place, dtype, random(), 16)
    rows, V = head.z.shape
    classes = _classes("", rows, V)
    target = place.array(classes, "int64")
    found = functional.linear_token_log_probs(head.x, head.W, target, temperature=TEMPERATURE, chunk_rows=10)
    leaves = [to_torch(v).requires_grad_() for v in head[:2]]
    theirs = _torch_token_log_probs(leaves[0] @ leaves[1].T, target)
    given = head.z, classes, TEMPERATURE
    for at, name in enumerate(("log_prob", "entropy", "lse")):
        upstream = tuple(float(i == at) for i in range(3))
        sheet = reference.token_log_probs(*given, upstream=upstream)  # type: ignore[arg-type]
        bound = _error_bounds.token_log_probs(*given, dtype=arrays.accumulate_dtype(head.x))
        moved = MORE * (head.error * abs(sheet.dlogits)).sum(1)
        yield Output(name, found[at], getattr(sheet, name), theirs[at], getattr(bound, name) + moved)
    sheet, bound = reference.token_log_probs(*given), _error_bounds.token_log_probs(*given, dtype="float32")
    error = bound.dlogits + MORE * 2 * head.error * reference.softmax(head.z / TEMPERATURE) / TEMPERATURE**2
    ours, torchs = torch.autograd.grad(found[0].sum(), head[:2]), torch.autograd.grad(theirs[0].sum(), leaves)
    for (name, exact, of), g, h in zip(head.gradients(sheet.dlogits, error, dtype), ours, torchs, strict=True):
        yield Output(name, g, exact, h, of)


def linear_distillation_loss(place: Place, dtype: str) -> Iterator[Output]:
    """KL(teacher ‖ student) of every row, in chunks, and the gradients of the student's x and W."""
    import torch

    from .. import functional

    rng = random()
    student, teacher = (_Head.of(place, dtype, rng, width) for width in (16, 24))
    options: dict[str, Any] = {"temperature": TEMPERATURE, "reduction": "none"}
    loss = functional.linear_distillation_loss(*student[:2], *teacher[:2], chunk_rows=10, **options)
    leaves = [to_torch(v).requires_grad_() for v in (*student[:2], *teacher[:2])]
    their_loss = _torch_divergence(leaves[0] @ leaves[1].T, leaves[2] @ leaves[3].T, "forward")
    sheet = reference.distillation_loss(student.z, teacher.z, **options)
    bound = _error_bounds.distillation_loss(student.z, teacher.z, **options, dtype="float32")
    moved = student.error * abs(sheet.dstudent) + teacher.error * abs(sheet.dteacher)
    yield Output("loss", loss, sheet.loss, their_loss, bound.loss + MORE * moved.sum(1))
    p, q = (reference.softmax(of.z / TEMPERATURE) for of in (teacher, student))
    error = bound.dstudent + MORE * 2 * (student.error * q + teacher.error * p) / TEMPERATURE**2
    ours, torchs = torch.autograd.grad(loss.sum(), student[:2]), torch.autograd.grad(their_loss.sum(), leaves[:2])
    for (name, exact, of), g, h in zip(student.gradients(sheet.dstudent, error, dtype), ours, torchs, strict=True):
        yield Output(name, g, exact, h, of)


LOSSES = tuple(
    Operation("S7", f"functional.{run.__name__}", run, dtypes=tuple(ROUNDED), kinds=("torch",))
    for run in (token_log_probs, distillation_loss, linear_token_log_probs, linear_distillation_loss)
)
