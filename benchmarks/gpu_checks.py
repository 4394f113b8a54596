"""Whether results on the GPU are right: every operation as `hw3gpu verify` checks it, and each row before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import hw3gpu
from hw3gpu import _error_bounds, reference
from hw3gpu._cli.arrays import Place, cupy_refusal, to_numpy
from hw3gpu._cli.operations import Operation, Output
from hw3gpu._cli.verify import OPERATIONS, Check, check
from hw3gpu._core import arrays, dispatch

from . import training_losses
from .harness import Deadline
from .rows import Inputs, Row

DTYPES = ("float32", "bfloat16", "float64", "float16")  # the most used first
SAMPLE = 4  # rows, or channels, of a large tensor that are held to the answer sheet


# ---------------------------------------------------------------------------------------------- every operation
@dataclass
class Verified:
    """What `hw3gpu verify` checks, as far as the time went."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)  # what the library says it cannot do here, as without CuPy
    unfinished: list[str] = field(default_factory=list)  # operations whose hard inputs were not all reached
    without_cupy: str | None = None

    def add(self, found: Check) -> bool:
        """True if it passed."""
        if found.passed:
            self.passed += 1
            return True
        where = ", ".join(filter(None, (*found.case, found.output)))
        kind = self.unavailable if found.note.startswith(dispatch.BackendError.__name__) else self.failures
        kind.append(f"{where}: {found.note or f'error {found.error:.2e}, allowed {found.tolerance:.2e}'}")
        return False


def _answers(alive: Callable[[], None]) -> bool:
    try:
        alive()
    except Exception:  # whatever it was, the device has been lost
        return False
    return True


def verify(device: str, deadline: Deadline, announce: Callable[[str], None], alive: Callable[[], None]) -> Verified:
    """Every operation on CUDA tensors and CuPy arrays, or on the host's for `device` 'cpu': an output of each in turn, ordinary
    inputs first, until all are checked or the time is over, or `alive`, asked after a failure, raises."""
    refusal = cupy_refusal() if device == "cuda" else "no GPU"
    kinds = ["torch"] if refusal else ["torch", "cupy"]
    found = Verified(without_cupy=refusal)
    waiting: dict[str, Iterator[Check]] = {}
    for dtype in DTYPES:
        for place in (Place(kind, device) for kind in kinds):
            for operation in OPERATIONS:
                if dtype in operation.dtypes and dtype in place.dtypes and place.kind in operation.kinds:
                    name = f"{operation.row} {operation.name}, {place.kind}, {dtype}"
                    waiting[name] = check(operation, "Triton kernels", place, dtype)
    while waiting and deadline.left > 0:
        for name, checks in list(waiting.items()):
            if deadline.left <= 0:
                break
            announce(name)
            one = next(checks, None)
            if one is None:
                del waiting[name]
            elif not found.add(one) and not _answers(alive):
                found.failures.append(f"{name}: after this the device does not answer any more")
                deadline = Deadline(0.0)
    found.unfinished = list(waiting)
    return found


# ---------------------------------------------------------------------------------------------- a row
def row_check(row: Row, given: Inputs, ours: Any, eager: Any) -> str:
    """'' if the row's results are right, else what is wrong. ours, eager: the result of forward and the gradients, of each."""

    def outputs(place: Place, dtype: str) -> Iterator[Output]:
        yield from _OUTPUTS[row.operation](row, given, ours, eager)

    operation = Operation("", row.name, outputs)
    checks = list(check(operation, "Triton kernels", Place("torch", given.x.device.type), row.dtype_name))
    wrong = Verified()
    for one in checks:
        wrong.add(one)
    return "; ".join(wrong.failures)


def _few(n: int) -> list[int]:
    """The first, the last and some between."""
    return sorted({(n - 1) * i // max(SAMPLE - 1, 1) for i in range(SAMPLE)})


def _rows_of(x: torch.Tensor, index: list[int]) -> torch.Tensor:
    return x.detach()[torch.tensor(index, device=x.device)]


def _cross_entropy(row: Row, given: Inputs, ours: Any, eager: Any) -> Iterator[Output]:
    index, N = _few(row.shape[0]), row.shape[0]
    z, (loss, (dz,)), (their_loss, (their_dz,)) = given.x.detach(), ours, eager
    assert given.target is not None
    target = to_numpy(_rows_of(given.target, index))
    target = target if row.soft else target.astype(np.int64)
    of_rows = to_numpy(_rows_of(z, index)), target
    upstream = np.full(len(index), 1.0 / N)
    sheet = reference.cross_entropy_with_options(*of_rows, reduction="none", upstream=upstream)
    acc = arrays.accumulate_dtype(z)
    bound = _error_bounds.cross_entropy_with_options(*of_rows, reduction="none", upstream=upstream, dtype=acc)
    yield Output("dz", _rows_of(dz, index), sheet.dlogits, _rows_of(their_dz, index), bound.dlogits)
    # the mean over all rows in float64, a piece at a time; rows are alike: twice the sampled rows' bound is that of all
    pieces = (given.target[i : i + 256] for i in range(0, N, 256))
    logits = (z[i : i + 256].double() for i in range(0, N, 256))
    sums = [
        torch.nn.functional.cross_entropy(x, y.double() if row.soft else y, reduction="sum")
        for x, y in zip(logits, pieces, strict=True)
    ]
    exact = to_numpy(torch.stack(sums).sum()) / N
    of_loss = 2.0 * bound.loss.max() + _error_bounds.sum_of_products(abs(exact), N // 256 + 32, dtype=acc)
    yield Output("loss", loss.detach(), exact, their_loss.detach(), of_loss)


def _softmax(row: Row, given: Inputs, ours: Any, eager: Any) -> Iterator[Output]:
    index = _few(row.shape[0])
    z, acc = to_numpy(_rows_of(given.x, index)), arrays.accumulate_dtype(given.x)
    (y, (dz,)), (their_y, (their_dz,)) = ours, eager
    y, their_y = _rows_of(y, index), _rows_of(their_y, index)
    yield Output("y", y, reference.softmax(z), their_y, _error_bounds.softmax(z, dtype=acc))
    back = to_numpy(_rows_of(given.upstream, index)), to_numpy(y)
    bound = _error_bounds.softmax_backward(*back, dtype=acc)
    yield Output("dz", _rows_of(dz, index), reference.softmax_backward(*back), _rows_of(their_dz, index), bound)


def _batch_norm(row: Row, given: Inputs, ours: Any, eager: Any) -> Iterator[Output]:
    index = _few(row.shape[1])
    acc = arrays.accumulate_dtype(given.x)

    def channels(t: torch.Tensor) -> torch.Tensor:
        return t.detach().index_select(1 if t.ndim > 1 else 0, torch.tensor(index, device=t.device))

    x, dy = to_numpy(channels(given.x)), to_numpy(channels(given.upstream))
    assert given.weight is not None
    assert given.bias is not None
    gamma, beta = to_numpy(channels(given.weight)), to_numpy(channels(given.bias))
    if row.statistics != "of the batch":
        yield from _known_statistics(row, given, ours, eager, channels)
        return
    norm = reference.batch_norm(x, gamma, beta)
    bound = _error_bounds.batch_norm(x, gamma, beta, dtype=acc)
    y, sheet_y, bound_y = channels(ours[0]), norm.y, bound.y
    if row.fused:
        assert given.residual is not None
        sheet_y = np.maximum(sheet_y + to_numpy(channels(given.residual)), 0.0)
        bound_y = bound_y + _error_bounds.unit_roundoff(acc) * abs(sheet_y)
        dy = dy * (to_numpy(y) > 0.0)  # where it is let through is the forward's own decision
    yield Output("y", y, sheet_y, channels(eager[0]), bound_y)
    sheet = reference.batch_norm_backward(dy, x, norm.mean, norm.var, gamma)
    bounds = _error_bounds.batch_norm_backward(dy, x, norm.mean, norm.var, gamma, dtype=acc, own_statistics=True)
    for at, name in enumerate(("dx", "dgamma", "dbeta")):
        actual, theirs = channels(ours[1][at]), channels(eager[1][at])
        yield Output(name, actual, getattr(sheet, name), theirs, getattr(bounds, name))
    if row.fused:
        yield Output("dresidual", channels(ours[1][3]), dy, channels(eager[1][3]), 0.0)


def _known_statistics(
    row: Row, given: Inputs, ours: Any, eager: Any, channels: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Output]:  # fmt: skip
    """Batch normalisation whose mean and variance do not depend on x: `ours` and `eager` without gradients in evaluation."""
    tensors = (given.upstream, given.x, *given.running, given.weight, given.bias)
    dy, x, mean, var, gamma, beta = (to_numpy(channels(t)) for t in tensors if t is not None)
    acc = arrays.accumulate_dtype(given.x)
    of_y = x, mean, var, gamma, beta
    bound_y = _error_bounds.batch_norm_inference(*of_y, dtype=acc)
    yield Output("y", channels(ours[0]), reference.batch_norm_inference(*of_y), channels(eager[0]), bound_y)
    sheet = reference.batch_norm_inference_backward(dy, x, mean, var, gamma)
    bounds = _error_bounds.batch_norm_inference_backward(dy, x, mean, var, gamma, dtype=acc)
    for actual, theirs, name in zip(ours[1], eager[1], ("dx", "dgamma", "dbeta"), strict=False):
        yield Output(name, channels(actual), getattr(sheet, name), channels(theirs), getattr(bounds, name))


def _linear_cross_entropy(row: Row, given: Inputs, ours: Any, eager: Any) -> Iterator[Output]:
    """Of all rows, by PyTorch's float64 on the device: the answer sheet has no product.

    The bound is that of three products, each summed in any order (`_error_bounds.sum_of_products`): logits z = x Wᵀ, whose
    roundings δz move p by p (δz + Σ p δz), and dx = dz W, dW = dzᵀ x.
    """
    x, weight = (t.detach().double() for t in given.leaves)
    assert given.target is not None
    N, V, u = len(x), len(weight), _error_bounds.unit_roundoff(arrays.accumulate_dtype(given.x))
    z = x @ weight.T
    of_z = u * (x.shape[1] + 1) * (x.abs() @ weight.abs().T)  # those of the sums
    of_z += torch.finfo(given.x.dtype).eps / 2 * z.abs()  # and of logits that are kept in the dtype of x
    loss = torch.nn.functional.cross_entropy(z, given.target)
    of_loss = to_numpy(2.0 * of_z.max() + u * (V + N) * loss.abs())
    yield Output("loss", ours[0].detach(), to_numpy(loss), eager[0].detach(), of_loss)
    p = torch.softmax(z, 1)
    of_z = p * (of_z + (p * of_z).sum(1, keepdim=True) + u * (V + 4)) / N
    p[torch.arange(N, device=p.device), given.target] -= 1.0
    dz = p.div_(N)
    of_dz = of_z + (u + torch.finfo(given.x.dtype).eps / 2) * dz.abs()
    exact = dz @ weight, dz.T @ x
    bounds = (of_dz @ weight.abs() + u * (V + 1) * (dz.abs() @ weight.abs()),
              of_dz.T @ x.abs() + u * (N + 1) * (dz.abs().T @ x.abs()))  # fmt: skip
    for name, mine, sheet, theirs, bound in zip(("dx", "dW"), ours[1], exact, eager[1], bounds, strict=True):
        index = _few(len(sheet))
        held = (to_numpy(_rows_of(of, index)) for of in (sheet, bound))
        yield Output(name, _rows_of(mine, index), next(held), _rows_of(theirs, index), next(held))


def _of_logits(row: Row, given: Inputs, ours: Any, eager: Any) -> Iterator[Output]:
    yield from training_losses.outputs_of_logits(row, given, ours, eager, _few(row.shape[0]))


def _of_products(row: Row, given: Inputs, ours: Any, eager: Any) -> Iterator[Output]:
    yield from training_losses.outputs_of_products(row, given, ours, eager, _few(row.shape[0]))


_OUTPUTS: dict[str, Callable[[Row, Inputs, Any, Any], Iterator[Output]]] = {
    "batch norm": _batch_norm,
    "cross entropy": _cross_entropy,
    "softmax": _softmax,
    "linear cross entropy": _linear_cross_entropy,
    **dict.fromkeys(("token log-probabilities", "distillation"), _of_logits),
    **dict.fromkeys(("linear token log-probabilities", "linear distillation"), _of_products),
}


def solver_check(row: Row, given: Inputs) -> str:
    """'' if the minimum is certified and is the sum of torch's least eigenvalues, else what is wrong."""
    found = hw3gpu.minimize_trace(given.x, row.k)
    least = torch.linalg.eigvalsh(given.x)[..., : row.k].sum(-1)
    if not np.all(to_numpy(torch.as_tensor(found.certified))):
        return "the minimum is not certified"
    error = to_numpy((torch.as_tensor(found.value, device=least.device) - least).abs().max() / least.abs().max())
    return "" if error < 1e-10 else f"the minimum is off torch's by {error:.1e} of it"
