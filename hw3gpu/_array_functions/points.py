"""Points whose mean and covariance are given, exactly, and the mean and covariance of points.

    (1/n) Σ x_i = μ    and    (1/n) Σ (x_i - μ)(x_i - μ)ᵀ = Σ

Such points x_1…x_n exist just when Σ is positive semidefinite and n ≥ rank(Σ) + 1: docs/derivations.md, section 4.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .._core import arrays, check, dispatch, outputs
from .._core.dlpack import given_back, interchange, is_foreign, taken
from .._linalg.numerics import REAL, Numerics, check_dtype, check_finite, check_square, eps, numerics, symmetric
from .._linalg.solvers import eigh

__all__ = ["MomentAccumulator", "Moments", "moments", "points_with_moments"]

Array = Any


class Moments(NamedTuple):
    """`mean` (..., m) and `covariance` (..., m, m) of points (..., n, m)."""

    mean: Array
    covariance: Array


@interchange
def moments(points: Array, *, ddof: int = 0) -> Moments:
    """The mean μ and the covariance Σ = 1/(n - ddof) Σ (x_i - μ)(x_i - μ)ᵀ of points (..., n, m), one a row; (4.1).

    One pass in float64 whatever the dtype, by a kernel (Numba, Triton): blocks of points, each centred twice while it is in
    cache, merged in order with compensated sums (section 4.5). The covariance therefore keeps its digits however far away
    the mean lies: for |μ| = 1e9 σ in float64 its error stays within 1e-14 of max Σ. It is exactly symmetric. NaN and
    infinities pass.

    Args:
        points: float32 or float64, n ≥ 1.
        ddof: what the divisor n - ddof lacks to n: 0 for the covariance of the points themselves, 1 for the unbiased
            estimate of the one they were drawn from. n - ddof ≥ 1.

    Returns:
        `Moments`, of the kind, dtype and device of `points`.

    Raises:
        TypeError: `points` is no array or has another dtype (float16 and bfloat16 are refused), `ddof` is no integer.
        ValueError: fewer than two axes, or n - ddof < 1.
        BackendError: the kernels that were asked for cannot run on `points`.
    """
    arrays.kind(points, "points")
    check_dtype(points, "points", REAL)
    check.rank_at_least(points, "points", 2, "..., n, m")
    ddof = _ddof(ddof)
    *batch, n, m = (int(size) for size in points.shape)
    if n - ddof < 1:
        raise ValueError(f"points: expected at least {ddof + 1} points (n, m) for ddof = {ddof}, got n = {n}")
    state = _State(math.prod(batch), m, points)
    state.update(points.reshape((math.prod(batch), n, m)))
    return state.moments(ddof, tuple(batch))


@interchange
def points_with_moments(mean: Array, covariance: Array, n: int | None = None, *, ddof: int = 0, rng: Any = None) -> Array:
    """Points X (..., n, m), one a row, with mean exactly μ and 1/(n - ddof) covariance exactly Σ, up to rounding.

        X = 1 μᵀ + sqrt(n - ddof) H Aᵀ,    Σ = A Aᵀ,    Hᵀ H = I_r,    Hᵀ 1 = 0     (docs/derivations.md, section 4.3)

    A (m, r) holds the eigenvectors of Σ times the roots of its eigenvalues, r = rank(Σ), and H (n, r) is Helmert's
    matrix: the points from the (r + 2)-nd on lie at μ. Computed in float64 and rounded once.

    Args:
        mean: μ (..., m), float32 or float64.
        covariance: Σ (..., m, m), of the kind, dtype and device of `mean`, symmetric and positive semidefinite,
            singular and zero Σ included. An eigenvalue in [-tol, tol] counts as 0, tol = m · eps · max |λ| with eps of
            that dtype.
        n: number of points. None gives the fewest possible, rank(Σ) + 1 (of a stack, its largest; with ddof at
            least ddof + 1).
        ddof: 0, or 1 for points whose *unbiased* covariance is Σ.
        rng: None for Helmert's matrix itself; a `numpy.random.Generator` or a seed for a random H, uniform (Haar) among
            all: a random member of the set of solutions (section 4.4), the same on every device.

    Returns:
        The points, of the kind, dtype and device of `covariance`.

    Raises:
        TypeError: an argument is no array, has another dtype (float16 and bfloat16 are refused) or another kind; `n` or
            `ddof` is no integer.
        ValueError: shapes that do not fit; NaN or infinities; Σ asymmetric (the message has the asymmetry found) or
            indefinite (an eigenvalue below -tol); n below the minimum, which the message names.
        BackendError: Σ lives on a GPU and CuPy cannot be used there.
    """
    with numerics(covariance, "covariance") as ns:
        dtype = check_dtype(covariance, "covariance", REAL)
        m = check_square(covariance, "covariance")
        _check_same_place(mean, "mean", covariance, "covariance")
        check.shape(mean, "mean", tuple(covariance.shape[:-1]), "that of covariance without its last axis")
        ddof = _ddof(ddof)
        n = None if n is None else check.integer_value(n, "n")
        centre = ns.read(mean)
        check_finite(ns, centre, "mean")
        factor, rank = _factor(ns, covariance, dtype)
        fewest = max(rank, ddof) + 1
        if n is None:
            n = fewest
        if n < fewest:
            why = f"rank(covariance) + 1 = {fewest}" if rank >= ddof else f"ddof + 1 = {fewest}"
            raise ValueError(f"n: expected at least {why} points, got {n}")
        if rng is not None:
            factor = _random_directions(ns, rng, factor.shape[:-2], n - 1, rank) @ factor
        x = ns.xp.empty((*factor.shape[:-2], n, m))
        x[...] = centre[..., None, :]
        x[..., : factor.shape[-2] + 1, :] += (n - ddof) ** 0.5 * _helmert_times(ns, factor)
        return ns.give(x, dtype)


def _ddof(ddof: Any) -> int:
    ddof = check.integer_value(ddof, "ddof")
    if ddof < 0:
        raise ValueError(f"ddof: expected 0 or more, got {ddof}")
    return ddof


def _check_same_place(x: Array, name: str, other: Array, other_name: str) -> None:
    arrays.same_kind(x, name, other, other_name)
    check.same_dtype(x, name, other, other_name)


def _factor(ns: Numerics, covariance: Array, dtype: str) -> tuple[Array, int]:
    """Aᵀ (..., r, m) with A Aᵀ = Σ, largest eigenvalue first, and r, the largest rank of the stack."""
    xp, m = ns.xp, covariance.shape[-1]
    scaled = symmetric(ns, covariance, "covariance", "float64")
    values, vectors = eigh(ns, scaled.s)
    tolerance = m * eps(dtype) * abs(values).max(axis=-1)
    positive = values > tolerance[..., None]
    indefinite, count = ns.fetch(values[..., 0] < -tolerance, positive.sum(axis=-1))
    if indefinite.any():
        scale = ns.host(scaled.scale)
        with np.errstate(over="ignore"):
            least, most, tol = (
                float((ns.host(a) / scale)[indefinite].flat[0]) for a in (values[..., 0], values[..., -1], tolerance)
            )
        raise ValueError(
            f"covariance: expected a positive semidefinite matrix, got an indefinite one: its smallest eigenvalue is "
            f"{least:.6g} (largest {most:.6g}, tolerance {tol:.3g})"
        )
    rank = int(count.max(initial=0))
    largest_first = slice(m - 1, m - 1 - rank if rank < m else None, -1)
    # scale = half² or 2 half², powers of two: λ / scale may be no number of float64 where its root is
    half = xp.ldexp(xp.ones_like(scaled.scale), (xp.frexp(scaled.scale)[1] - 1) // 2)
    variances = xp.where(positive, values, 0)[..., largest_first] / (scaled.scale / half / half)[..., None]
    roots = xp.sqrt(variances) / half[..., None]
    return (vectors[..., largest_first] * roots[..., None, :]).swapaxes(-1, -2), rank


def _helmert_times(ns: Numerics, c: Array) -> Array:
    """H C (..., r + 1, m) for C (..., r, m) and Helmert's H (r + 1, r), in O(r m).

    Column j of H holds 1 in its first j rows, -j in row j + 1 and 0 below, over sqrt(j (j + 1)).
    """
    xp, r = ns.xp, c.shape[-2]
    j = xp.arange(1, r + 1, dtype="float64")[:, None]
    scaled = c / xp.sqrt(j * (j + 1))
    product = xp.zeros((*c.shape[:-2], r + 1, c.shape[-1]))
    product[..., :r, :] = scaled[..., ::-1, :].cumsum(axis=-2)[..., ::-1, :]
    product[..., 1:, :] -= j * scaled
    return product


def _random_directions(ns: Numerics, rng: Any, batch: tuple[int, ...], size: int, rank: int) -> Array:
    """(..., size, rank), orthonormal columns, Haar distributed: Q of a Gaussian matrix, its R made positive."""
    try:
        generator = np.random.default_rng(rng)
    except TypeError as error:
        raise TypeError(f"rng: expected None, a numpy.random.Generator or a seed, got {rng!r} ({error})") from None
    gaussian = generator.standard_normal((*batch, size, rank))
    q, r = np.linalg.qr(gaussian)
    diagonal = r.diagonal(axis1=-2, axis2=-1)
    return ns.xp.asarray(q * np.where(diagonal < 0, -1.0, 1.0)[..., None, :])


class _State:
    """The moments of `count` points of m variables, B sets of them, in float64, as `kernels/cpu/moments.py` keeps them.

    shift (B, m) is a mean that float64 holds, total (2, B, m) the sum of the points less it, scatter (2, B, m, m) the lower
    triangle of Σ (x_i - μ)(x_i - μ)ᵀ; index 1 has what additions to index 0 rounded off. unit (B, m) is the power of two by
    which all of a variable is multiplied.
    """

    def __init__(self, sets: int, m: int, like: Array) -> None:
        self.count, self.m, self.like = 0, m, like
        sizes = (sets, m), (2, sets, m), (2, sets, m, m), (sets, m)
        self.arrays = tuple(outputs.empty(size, "float64", like) for size in sizes)

    def update(self, points: Array) -> None:
        """Add the points (B, n, m), n ≥ 1."""
        which = dispatch.backend(self.like)
        with dispatch.launch_scope(self.like):
            dispatch.moments(which).update(*map(dispatch.kernel_view(which), (points, *self.arrays)), count=self.count)
        self.count += int(points.shape[1])

    def merge(self, other: _State) -> None:
        """Add all points of `other`, at least one, which lies where this one does."""
        which = dispatch.backend(self.like)
        states = map(dispatch.kernel_view(which), (*other.arrays, *self.arrays))
        with dispatch.launch_scope(self.like):
            dispatch.moments(which).merge(*states, more=other.count, count=self.count)
        self.count += other.count

    def moments(self, ddof: int, batch: tuple[int, ...]) -> Moments:
        """μ (*batch, m) and Σ (*batch, m, m), in the dtype of `like`."""
        shift = self.arrays[0]
        mean, covariance = (
            outputs.empty((*shift.shape, *more), arrays.dtype_name(self.like), self.like) for more in ((), shift.shape[1:])
        )
        which = dispatch.backend(self.like)
        operands = map(dispatch.kernel_view(which), (*self.arrays, mean, covariance))
        with dispatch.launch_scope(self.like):
            dispatch.moments(which).finish(*operands, count=self.count, divisor=self.count - ddof)
        return Moments(mean.reshape((*batch, self.m)), covariance.reshape((*batch, self.m, self.m)))

    def packed(self) -> Any:
        """count and the arrays as one torch tensor (1 + 4 m + 2 m²) of float64, for B = 1, where the arrays live."""
        import torch

        parts = [dispatch.kernel_view("gpu")(a).reshape(-1) for a in self.arrays]
        return torch.cat([torch.tensor([float(self.count)], dtype=torch.float64, device=parts[0].device), *parts])

    @classmethod
    def unpacked(cls, packed: Any, m: int, like: Array) -> _State:
        """The state that `packed` was made from, where `like` lives."""
        state = cls.__new__(cls)
        state.count, state.m, state.like = int(packed[0]), m, like
        kind = arrays.kind(like, "like")
        values = packed[1:].to(like.device) if kind == "torch" else packed[1:]
        values = values.cpu().numpy() if kind == "numpy" else values
        if kind == "cupy":
            with like.device:
                values = arrays.namespace(like).asarray(values.cpu().numpy())
        shift, total, scatter, unit = values[:m], values[m : 3 * m], values[3 * m : -m], values[-m:]
        state.arrays = shift.reshape(1, m), total.reshape(2, 1, m), scatter.reshape(2, 1, m, m), unit.reshape(1, m)
        return state


class MomentAccumulator:
    """The moments of points that arrive in batches, or lie on several machines: (μ, Σ) in O(m²) memory.

        total = MomentAccumulator()
        for batch in batches:                 # (n_b, m) each, any n_b
            total.update(batch)
        total.all_reduce()                    # over the ranks of torch.distributed, if there are any
        mean, covariance = total.moments()

    A batch is read once, by the kernel of `moments`, which adds it to what it has (Chan, Golub and LeVeque; section 4.5) in
    float64. The mean is kept as a constant, close to it, plus a rest, and every sum with what its additions have rounded
    off: the covariance keeps its digits where the mean is large, and however many batches come.

    Args:
        m: number of variables; None takes it from the first batch. A rank that may see no batch needs it.
    """

    def __init__(self, m: int | None = None) -> None:
        self.m = None if m is None else check.integer_value(m, "m")
        if self.m is not None and self.m < 1:
            raise ValueError(f"m: expected at least 1, got {self.m}")
        self._state: _State | None = None  # once there are points; `like` in it, a batch's first, has their kind and dtype
        self._namespace: Any = None  # that of the first batch, where it is neither NumPy's, CuPy's nor torch's

    @property
    def count(self) -> int:
        """The number of points seen."""
        return 0 if self._state is None else self._state.count

    def update(self, points: Array) -> MomentAccumulator:
        """Add a batch of points (n, m), float32 or float64, n ≥ 0, of the kind, dtype and device of the first one.

        Raises TypeError for another kind or dtype, ValueError for another shape. Returns the accumulator.
        """
        if is_foreign(points) and self._namespace is None:
            self._namespace = points.__array_namespace__()
        points = taken(points, "points")
        arrays.kind(points, "points")
        check_dtype(points, "points", REAL)
        if points.ndim != 2 or self.m not in (None, int(points.shape[1])) or points.shape[1] < 1:
            raise ValueError(f"points: expected shape (n, {self.m or 'm'}), got {check.shape_of(points)}")
        if self._state is not None:
            _check_same_place(points, "points", self._state.like, "the first batch")
        self.m = int(points.shape[1])
        if points.shape[0]:
            with arrays.device_scope(points):
                self._own(points).update(points[None])
        return self

    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Add all points that `other` has seen; `other` stays as it is. Returns the accumulator."""
        if not isinstance(other, MomentAccumulator):
            raise TypeError(f"other: expected a MomentAccumulator, got {type(other).__name__}")
        if None not in (self.m, other.m) and self.m != other.m:
            raise ValueError(f"other: expected m = {self.m} variables, got {other.m}")
        self.m = self.m if other.m is None else other.m
        if other._state is not None:
            if self._state is not None:
                _check_same_place(other._state.like, "other", self._state.like, "this accumulator's batches")
            with arrays.device_scope(other._state.like):
                self._own(other._state.like).merge(other._state)
            self._namespace = self._namespace or other._namespace
        return self

    def _own(self, like: Array) -> _State:
        """The state, an empty one where `like` lives if there was none."""
        if self._state is None:
            assert self.m is not None
            # no more than one point: the batch itself may be large, and is not this object's to keep
            self._state = _State(1, self.m, outputs.empty((1, self.m), arrays.dtype_name(like), like))
        return self._state

    def all_reduce(self, group: Any = None) -> MomentAccumulator:
        """Every rank of a `torch.distributed` group (None: the default one) gets the sum over all ranks.

        One collective, an all-gather of 1 + 4 m + 2 m² float64 a rank, merged in the order of ranks, so that all get the
        same bits. Ranks may hold different numbers of points, also none. Returns the accumulator.
        """
        import torch
        from torch import distributed

        if self.m is None:
            raise ValueError("m: a rank that has seen no batch needs MomentAccumulator(m) before all_reduce")
        device = torch.device("cuda" if distributed.get_backend(group) == "nccl" else "cpu")
        if self._state is None:
            like: Array = torch.empty((1, self.m), dtype=torch.float64, device=device)
            packed = torch.zeros(1 + 4 * self.m + 2 * self.m**2, dtype=torch.float64, device=device)
        else:
            like, packed = self._state.like, self._state.packed().to(device)
        everyone = [torch.empty_like(packed) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyone, packed, group=group)
        self._state = None
        for part in everyone:
            if part[0] > 0:
                self._own(like).merge(_State.unpacked(part, self.m, like))
        return self

    def moments(self, *, ddof: int = 0) -> Moments:
        """(μ, Σ) of all points seen, with divisor n - ddof ≥ 1, of the batches' kind, dtype and device."""
        ddof = _ddof(ddof)
        if self._state is None or self.count - ddof < 1:
            raise ValueError(f"moments: expected at least {ddof + 1} points for ddof = {ddof}, got {self.count}")
        with arrays.device_scope(self._state.like):
            result = self._state.moments(ddof, ())
        return result if self._namespace is None else given_back(result, self._namespace)
