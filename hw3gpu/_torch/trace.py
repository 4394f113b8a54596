"""The trace minimum in torch's autograd: docs/derivations.md, section 5.5.

    value    ∂f/∂Σ = Φ Φᵀ                                                                       (5.15)
    Φ        dΦ = Σ_{i≤k<j} q_j (q_jᵀ dΣ φ_i) / (λ_i - λ_j) e_iᵀ, what (5.16) says of P = Φ Φᵀ

The second leaves out how Φ turns within its span, which no function of the subspace sees. It divides by λ_i - λ_j for
i ≤ k < j alone, never by less than the gap: eigenvalues that coincide among the k do no harm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from .._core import check
from .._linalg.numerics import (
    COMPLEX,
    REAL,
    check_dtype,
    check_square,
    eps,
    fix_signs,
    frobenius,
    numerics,
    real_dtype,
    symmetric,
)
from .._linalg.solvers import check_method, eigh, smallest
from . import arguments, dtensor, operators
from .autograd import no_second_derivative

__all__ = ["TraceSubspace", "minimize_trace"]

_DOUBLE = {"float32": "float64", "float64": "float64", "complex64": "complex128", "complex128": "complex128"}


class TraceSubspace(NamedTuple):
    """The minimum of Trace(Φᵀ Σ Φ) over Φᵀ Φ = I_k and where it is taken, as torch tensors of Σ's dtype and device.

    Attributes:
        value: (...), differentiable.
        phi: (..., m, k), orthonormal columns; differentiable for functions of span Φ alone, such as `projector`.
        eigenvalues: (..., k), ascending (with `largest`, descending); not differentiable.
        gap: (...), |λ_{k+1} - λ_k|, inf at k = m; not differentiable.
    """

    value: torch.Tensor
    phi: torch.Tensor
    eigenvalues: torch.Tensor
    gap: torch.Tensor

    @property
    def projector(self) -> torch.Tensor:
        """P = Φ Φᵀ (..., m, m), which does not depend on the choice of a basis; differentiable."""
        return self.phi @ self.phi.mH


def minimize_trace(covariance: torch.Tensor, k: int, *, largest: bool = False, method: str = "auto") -> TraceSubspace:
    """`hw3gpu.minimize_trace` for torch tensors that need gradients: the value and the subspace, without certificate.

    Solved in float64 whatever the dtype, and so is the gradient. The gradient is symmetric (Hermitian): it is that of the
    function of the symmetric part of `covariance`.

    Args:
        covariance: Σ (..., m, m), symmetric or Hermitian; float32, float64, complex64 or complex128.
        k: number of columns, 1 ≤ k ≤ m.
        largest: maximise instead.
        method: as in `hw3gpu.minimize_trace`.

    Raises:
        TypeError, ValueError: as `hw3gpu.minimize_trace`.
        ValueError, from `backward`: the gap is zero within rounding, so that there is no derivative.
        RuntimeError: a second derivative.
    """
    arguments.tensor(covariance, "covariance")
    dtensor.refuse(covariance, "covariance")
    check_dtype(covariance, "covariance", REAL + COMPLEX)
    m = check_square(covariance, "covariance")
    k = check.integer_value(k, "k")
    if not 1 <= k <= m:
        raise ValueError(f"k: expected 1 <= k <= m = {m}, got {k}")
    check.boolean(largest, "largest")
    check_method(method, covariance.is_cpu)
    return TraceSubspace(*FORWARD(covariance, k, largest, method)[:4])


# ---------------------------------------------------------------------------------------------- forward and backward
@np.errstate(over="ignore")
def _run(covariance: torch.Tensor, k: int, largest: bool, method: str) -> tuple[torch.Tensor, ...]:
    """value, phi, eigenvalues and gap; then phi in float64 and whether the gap is zero within rounding, for backward."""
    given = check_dtype(covariance, "covariance", REAL + COMPLEX)
    real = real_dtype(given)
    sign = -1.0 if largest else 1.0
    with numerics(covariance, "covariance") as ns:
        scaled = symmetric(ns, covariance, "covariance", _DOUBLE[given])
        sigma, xp = sign * scaled.s, ns.xp
        values, vectors, _ = smallest(ns, sigma, k, method)
        kept, (phi, rounded) = values[..., :k], fix_signs(ns, vectors[..., :k], given)
        m = sigma.shape[-1]
        gap = values[..., k] - kept[..., -1] if k < m else xp.full(kept.shape[:-1], float("inf"))
        rounding = m * eps(_DOUBLE[given]) * frobenius(xp, sigma)
        degenerate = bool(ns.fetch(gap <= rounding)[0].any())
        unit = sign / scaled.scale
        outputs = (
            ns.give(kept.sum(axis=-1) * unit, real),
            ns.give(rounded, given),
            ns.give(kept * unit[..., None], real),
            ns.give(gap * abs(unit), real),
            ns.give(phi, _DOUBLE[given]),
        )
    return *(v.contiguous() for v in outputs), covariance.new_full((), degenerate, dtype=torch.bool)


def _run_backward(dvalue: Any, dphi: Any, covariance: torch.Tensor, phi: torch.Tensor, degenerate: Any, largest: bool) -> Any:
    """The gradient of `covariance`, from phi in float64."""
    if degenerate:
        raise ValueError(
            "covariance: the gap between eigenvalues k and k + 1 is zero within rounding, so that the minimum has no "
            "derivative there: choose another k"
        )
    k, gradient = phi.shape[-1], torch.zeros(covariance.shape, dtype=phi.dtype, device=phi.device)
    if dvalue is not None:
        gradient += dvalue.to(phi.real.dtype)[..., None, None] * (phi @ phi.mH)
    if dphi is not None and k < covariance.shape[-1]:
        gradient += _pull_back(covariance, phi, dphi.to(phi.dtype), k, -1.0 if largest else 1.0)
    return ((gradient + gradient.mH) / 2).to(covariance.dtype)


def _pull_back(covariance: torch.Tensor, phi: torch.Tensor, dphi: torch.Tensor, k: int, sign: float) -> torch.Tensor:
    """Σ_{i≤k<j} q_j (q_jᵀ ∂ℓ/∂φ_i) / (λ_i - λ_j) φ_iᵀ: needs all eigenpairs, which a range-limited forward has not found."""
    with numerics(covariance, "covariance") as ns:
        scaled = symmetric(ns, covariance, "covariance", str(phi.dtype).removeprefix("torch."))
        values, vectors = eigh(ns, sign * scaled.s)
        difference = (values[..., None, :k] - values[..., k:, None]) / scaled.scale[..., None, None] * sign
        others = ns.give(vectors[..., k:], str(phi.dtype).removeprefix("torch."))
        differences = ns.give(difference, "float64")
    return others @ ((others.mH @ dphi) / differences) @ phi.mH


# ---------------------------------------------------------------------------------------------- autograd and operators
class _MinimizeTrace(torch.autograd.Function):
    """The operator's autograd. Eager calls use the operator too: its cost is nothing compared with an eigensolver's."""

    @staticmethod
    def forward(ctx: Any, covariance: torch.Tensor, k: int, largest: bool, method: str) -> tuple[torch.Tensor, ...]:
        outputs = operators.below_autograd(FORWARD, covariance, k, largest, method)
        ctx.save_for_backward(covariance, *outputs[4:])
        ctx.largest = largest
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @no_second_derivative("minimize_trace")
    def backward(ctx: Any, dvalue: Any, dphi: Any, *_: Any) -> tuple[torch.Tensor | None, None, None, None]:
        return BACKWARD(dvalue, dphi, *ctx.saved_tensors, ctx.largest), None, None, None


def _fake(covariance: torch.Tensor, k: int, largest: bool, method: str) -> tuple[torch.Tensor, ...]:
    batch, m, real = covariance.shape[:-2], covariance.shape[-1], covariance.real.dtype
    exact = getattr(torch, _DOUBLE[str(covariance.dtype).removeprefix("torch.")])
    return (
        covariance.new_empty(batch, dtype=real),
        covariance.new_empty((*batch, m, k)),
        covariance.new_empty((*batch, k), dtype=real),
        covariance.new_empty(batch, dtype=real),
        covariance.new_empty((*batch, m, k), dtype=exact),
        covariance.new_empty((), dtype=torch.bool),
    )


FORWARD = operators.define(
    "minimize_trace(Tensor covariance, int k, bool largest, str method) -> "
    "(Tensor value, Tensor phi, Tensor eigenvalues, Tensor gap, Tensor exact, Tensor degenerate)",
    _run,
    _fake,
    _MinimizeTrace.apply,
)
BACKWARD = operators.define(
    "minimize_trace_backward(Tensor? dvalue, Tensor? dphi, Tensor covariance, Tensor exact, Tensor degenerate, bool largest) "
    "-> Tensor",
    _run_backward,
    lambda dvalue, dphi, covariance, *_: torch.empty_like(covariance, memory_format=torch.contiguous_format),
)
