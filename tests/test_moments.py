"""S8: the moments of points, at once and from batches (`hw3gpu.moments`, `MomentAccumulator`)."""

from __future__ import annotations

import operator
from fractions import Fraction

import numpy as np
import pytest

from hw3gpu import MomentAccumulator, moments, reference


# -------------------------------------------------------------------------------------------------------- the moments
def exact_moments(x, ddof=0):
    """μ and Σ in rational arithmetic, rounded once."""
    x = [[Fraction(float(v)) for v in row] for row in x]
    n, m = len(x), len(x[0])
    mean = [sum(column) / n for column in zip(*x, strict=True)]
    cov = [[sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in x) / (n - ddof) for j in range(m)] for i in range(m)]
    return np.array(mean, dtype=np.float64), np.array(cov, dtype=np.float64)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e9, -1e12], ids="mean {:g}".format)
@pytest.mark.parametrize(("n", "ddof"), [(1, 0), (2, 0), (2, 1), (1100, 1)])
def test_moments_far_from_the_origin(offset, n, ddof):
    x = np.random.default_rng(0).standard_normal((n, 3)) @ np.diag([1.0, 3, 0.1]) + offset
    mean, cov = exact_moments(x, ddof)
    got = moments(x, ddof=ddof)
    # the mean to one rounding of itself or of the points' spread, the covariance to 1e-14 of its largest entry
    assert np.all(np.abs(got.mean - mean) <= np.spacing(np.abs(mean) + 3))
    assert np.abs(got.covariance - cov).max() <= 1e-14 * np.abs(cov).max()
    assert np.array_equal(got.covariance, got.covariance.T)


def test_moments_of_float32_are_summed_in_float64():
    x = (np.random.default_rng(0).standard_normal((2100, 2)) + 1e4).astype(np.float32)
    mean, cov = exact_moments(x)
    got = moments(x)
    assert np.array_equal(got.mean, mean.astype(np.float32))
    assert np.abs(got.covariance - cov).max() <= 2.0**-23 * np.abs(cov).max()


def test_moments_of_strided_and_special_points():
    x = np.random.default_rng(0).standard_normal((50, 8))
    for view in (x[::-2, ::2], np.asfortranarray(x), x.T):
        expected = reference.moments(np.ascontiguousarray(view))
        np.testing.assert_allclose(moments(view).covariance, expected.covariance, atol=1e-14)
        np.testing.assert_allclose(moments(view).mean, expected.mean, atol=1e-14)
    x[3, 2] = np.nan
    got = moments(x)
    assert np.isnan(got.mean[2])
    assert np.isnan(got.covariance[2]).all()
    assert np.isfinite(got.covariance[:2, :2]).all()


def test_many_blocks_are_merged_in_order():
    """Ninety blocks and a bit, against extended precision; the mean is far enough that one pass would lose all."""
    x = np.random.default_rng(0).standard_normal((90 * 128 + 100, 3)) + np.array([1e9, -1e6, 0])
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(axis=0)
    got = moments(x)
    assert np.abs(got.covariance - centred.T @ centred / len(x)).max() <= 1e-14
    assert np.all(np.abs(got.mean - wide.mean(axis=0)) <= np.spacing(np.abs(got.mean) + 1))


# n below, at and beyond a block and a run; m below, at and beyond a tile of either kernel
SHAPES = [(1, 1, 1), (1, 129, 2), (3, 5, 4), (1, 64, 5), (2, 70, 17), (1, 40, 33), (1, 530, 3), (0, 4, 2), (2, 3, 0)]


@pytest.mark.parametrize(("sets", "n", "m"), SHAPES, ids=str)
def test_every_plan_of_the_kernels(kit, sets, n, m):
    x = np.random.default_rng(0).standard_normal((sets, n, m)) + 1e6
    got = moments(kit.array(x, "float64"), ddof=min(n - 1, 1))
    assert tuple(got.mean.shape) == (sets, m)
    assert tuple(got.covariance.shape) == (sets, m, m)
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(axis=1, keepdims=True)
    expected = centred.swapaxes(1, 2) @ centred / (n - min(n - 1, 1))
    covariance = kit.numpy(got.covariance)
    np.testing.assert_allclose(covariance, expected.astype(np.float64), atol=1e-14, rtol=0)
    np.testing.assert_allclose(kit.numpy(got.mean), wide.mean(axis=1).astype(np.float64), rtol=2.3e-16)
    assert np.array_equal(covariance, covariance.swapaxes(1, 2))


@pytest.mark.parametrize(("n", "m"), [(1300, 3), (700, 600), (2100, 520)], ids=["runs", "bands", "runs and bands"])
def test_any_number_of_threads_gives_the_same_bits(n, m):
    from hw3gpu.kernels.cpu._numba.threads import set_num_threads

    x = np.random.default_rng(0).standard_normal((n, m)) + 1e6
    found = []
    for threads in (1, 2, 5):
        set_num_threads(threads)
        try:
            found.append(moments(x))
        finally:
            set_num_threads(None)
    for other in found[1:]:
        assert np.array_equal(found[0].mean, other.mean)
        assert np.array_equal(found[0].covariance, other.covariance)
    centred = (x - 1e6) - (x - 1e6).mean(axis=0)
    np.testing.assert_allclose(found[0].covariance, centred.T @ centred / n, atol=1e-14)


def test_infinite_points_have_an_infinite_mean_and_touch_no_other_variable(kit):
    x = np.random.default_rng(0).standard_normal((150, 4))
    expected = reference.moments(x)
    x[140, 1], x[3, 2] = np.inf, -np.inf
    got = moments(kit.array(x, "float64"))
    mean, covariance = kit.numpy(got.mean), kit.numpy(got.covariance)
    assert mean[1:3].tolist() == [np.inf, -np.inf]
    assert np.isnan(covariance[1:3]).all()
    np.testing.assert_allclose(mean[[0, 3]], expected.mean[[0, 3]], atol=1e-15)
    np.testing.assert_allclose(covariance[::3, ::3], expected.covariance[::3, ::3], atol=1e-15)


SIZES = ((10_000, 3), (10_000, 16), (10_000, 40), (500, 1000))


COMPILED = [(arch, n, m) for n, m in SIZES for arch in (80, 90, 100, 120, "gfx942")]


AT_ONCE = ((80, 3), (90, 16), (100, 40), (120, 1000), ("gfx942", 16))  # each architecture and each size


@pytest.mark.parametrize(
    ("arch", "n", "m"),
    [pytest.param(*case, marks=[] if (case[0], case[2]) in AT_ONCE else pytest.mark.slow) for case in COMPILED],
    ids=str,
)
def test_the_triton_kernels_compile_without_a_spill(arch, n, m):
    torch = pytest.importorskip("torch")
    from benchmarks.evidence import run as evidence
    from benchmarks.evidence.compile_without_gpu import StandIn
    from hw3gpu.kernels.gpu import moments as kernels

    def meta(*shape, dtype=torch.float64):
        return torch.empty(shape, dtype=dtype, device="meta")

    state, more = ((meta(1, m), meta(2, 1, m), meta(2, 1, m, m), meta(1, m)) for _ in range(2))
    with StandIn(arch) as device:
        kernels.update(meta(1, n, m, dtype=torch.float32), *state, count=7)
        kernels.update(meta(1, n, m), *state, count=7)
        kernels.merge(*more, *state, more=3, count=7)
        kernels.finish(*state, meta(1, m), meta(1, m, m), count=10, divisor=9)
    assert {launch.name for launch in device.launches} == {"_add_runs_kernel", "_merge_kernel", "_finish_kernel"}
    for launch in device.launches:
        assert launch.grid[0] < 2**31
        assert evidence.findings(launch, arch, torch.float64)[1] == []


def test_the_plan_fills_the_device_and_its_runs_hold_no_more_than_the_points():
    from hw3gpu.kernels.gpu.plan import cdiv, plan_moments

    for sets, n, m in [(1, 1, 1), (1, 10**9, 3), (1, 10**6, 64), (1000, 10**5, 8), (1, 3000, 2048), (1, 10**5, 10**4)]:
        plan = plan_moments(sets, n, m)
        tiles = cdiv(m, plan.BLOCK_M)
        assert plan.BLOCK_N % plan.GROUP == 0
        assert plan.runs == 1 or plan.runs * m <= n
        assert plan.runs == 1 or sets * plan.runs * tiles * (tiles + 1) // 2 <= 2 * 4 * 132
        assert sets * plan.runs * tiles**2 < 2**31


def exact_to_the_last(x, ddof=0):
    """As `exact_moments`, infinite where there is no such number."""

    def number(q):
        try:
            return float(q)
        except OverflowError:
            return np.inf if q > 0 else -np.inf

    # in units of the smallest number all are integers
    columns = [[int(Fraction(float(v)) * 2**1074) for v in column] for column in x.T]
    n, sums = len(x), [sum(column) for column in columns]
    mean = [number(Fraction(total, n << 1074)) for total in sums]
    cov = [
        [
            number(Fraction(n * sum(map(operator.mul, a, b)) - total_a * total_b, n * (n - ddof) << 2148))
            for b, total_b in zip(columns, sums, strict=True)
        ]
        for a, total_a in zip(columns, sums, strict=True)
    ]
    return np.array(mean), np.array(cov)


def extreme_points(n):
    """Variables at both ends of float64, together: their covariances are numbers, or infinite, or 0, and each is right."""
    x = np.random.default_rng(0).uniform(-1, 1, (n, 7)) * [1e154, 1e153, 1, 1e-150, 1e-160, 1e-170, 1e155]
    x[:, 1] += 1.7e308
    x[n // 2 :, 2] += 1e150  # grows late
    return np.column_stack([x, np.full(n, 1.7e308), np.full(n, -3e-310)])


def test_blocks_before_a_variable_outgrows_its_unit_still_count(tensors):
    x = np.repeat([0.75, 1.5], 128)[:, None] * 2.0**480
    assert tensors.numpy(moments(tensors.array(x, "float64")).mean) == pytest.approx(1.125 * 2.0**480, rel=1e-14)


@pytest.mark.parametrize("n", [2, 150, 1300], ids=["a block", "blocks", "runs"])
def test_moments_at_both_ends_of_float64(tensors, n):
    x = extreme_points(n)
    mean, covariance = exact_to_the_last(x)
    got = moments(tensors.array(x, "float64"))
    check_extremes(x, tensors.numpy(got.mean), tensors.numpy(got.covariance), mean, covariance)
    if n > 2:  # in batches, the first of ordinary size, and merged in both orders
        parts = [x[:7] * 2.0**-600, x[7:100], x[100:]]
        mean, covariance = exact_to_the_last(np.concatenate(parts))
        states = [MomentAccumulator().update(tensors.array(part, "float64")) for part in parts]
        one_by_one = MomentAccumulator()
        for part in parts:
            one_by_one.update(tensors.array(part, "float64"))
        forward, backward = MomentAccumulator(), MomentAccumulator()
        for i in range(3):
            forward.merge(states[i])
            backward.merge(states[2 - i])
        for total in (one_by_one, forward, backward):
            got = total.moments()
            check_extremes(np.concatenate(parts), tensors.numpy(got.mean), tensors.numpy(got.covariance), mean, covariance)


def check_extremes(x, mean, covariance, exact_mean, exact_covariance):
    """Deviations to 1e-14 of a variable's spread, or to the distance between the smallest numbers; so their products."""
    assert np.all(abs(mean - exact_mean) <= 1e-15 * abs(x).max(axis=0) + 5e-324)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = np.ptp(x / 2, axis=0)
        step = np.maximum(1e-14 * spread, 5e-324)
        allowed = step[:, None] * spread[None, :] + spread[:, None] * step[None, :]
        wrong = abs(covariance - exact_covariance) > np.where(np.isfinite(allowed), allowed, 1.7e308) + 5e-324
    assert not wrong[np.isfinite(exact_covariance)].any(), np.argwhere(wrong)
    assert np.array_equal(np.isfinite(covariance), np.isfinite(exact_covariance))
    assert np.array_equal(covariance, covariance.T)


def test_two_points_as_far_apart_as_float64_has(kit):
    for x, mean, variance in [
        ([1e154, -1e154], 0.0, 1e308),
        ([1.7e308, 1.7e308], 1.7e308, 0.0),
        ([1.7e308, -1.7e308], 0.0, np.inf),
        ([1e-160, -3e-160], -1e-160, 4e-320),
        ([1e-170, -1e-170], 0.0, 0.0),
        ([np.inf, 1.0], np.inf, np.nan),
    ]:
        got = moments(kit.array(np.array(x)[:, None], "float64"))
        np.testing.assert_allclose(kit.numpy(got.mean), [mean], rtol=1e-15)
        np.testing.assert_allclose(kit.numpy(got.covariance), [[variance]], rtol=1e-4 if 0 < variance < 1e-300 else 1e-14)


# ------------------------------------------------------------------------------------------------- the accumulator
@pytest.mark.parametrize("offset", [0.0, 1e9], ids="mean {:g}".format)
def test_batches_accumulate_to_the_moments_of_all_points(kit, offset):
    x = np.random.default_rng(0).standard_normal((3000, 4)) * [1, 3, 0.1, 0] + offset
    batches = np.split(x, [1, 1, 700, 2999])  # one point, none, many, one
    total = MomentAccumulator()
    for batch in batches:
        assert total.update(kit.array(batch, "float64")) is total
    expected = moments(x, ddof=1)
    got = total.moments(ddof=1)
    assert total.count == 3000
    assert type(got.mean) is type(kit.array(x))
    np.testing.assert_allclose(kit.numpy(got.mean), expected.mean, rtol=4e-16, atol=1e-15)
    np.testing.assert_allclose(kit.numpy(got.covariance), expected.covariance, atol=2e-14 * 9)


def test_accumulators_merge_in_any_grouping(kit):
    x = np.random.default_rng(0).standard_normal((90, 3)) + 1e8
    parts = [MomentAccumulator().update(kit.array(part, "float32")) for part in np.split(x, 3)]
    empty = MomentAccumulator()
    left = MomentAccumulator(3).merge(parts[0]).merge(empty).merge(parts[1]).merge(parts[2])
    right = empty.merge(parts[1]).merge(parts[2]).merge(parts[0])
    assert left.count == right.count == 90
    assert parts[1].count == 30  # what is merged in stays as it is
    rounded = moments(x.astype(np.float32).astype(np.float64))
    for total in (left, right):
        assert str(total.moments().mean.dtype).removeprefix("torch.") == "float32"
        np.testing.assert_allclose(kit.numpy(total.moments().covariance), rounded.covariance, rtol=1e-6, atol=1e-4)


def test_ten_thousand_batches_cost_no_digits():
    """What each addition rounds off is kept: without it the covariance of these is off by 1e-13, the mean by more."""
    x = np.random.default_rng(0).standard_normal((20_000, 2)) + np.array([1e8, 3.0])
    total = MomentAccumulator()
    for batch in x.reshape(10_000, 2, 2):
        total.update(batch)
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(axis=0)
    got = total.moments()
    assert np.abs(got.covariance - centred.T @ centred / len(x)).max() <= 1e-15
    assert np.all(np.abs(got.mean - wide.mean(axis=0)) <= np.spacing(np.abs(got.mean)))


def test_a_hundred_batches_round_a_variance_twice(tensors):
    """Where the two parts of the scatter meet, and where it is divided; those of the products add a tenth of one."""
    x = np.random.default_rng(0).standard_normal((200, 16)) + 3.0
    total = MomentAccumulator()
    for batch in x.reshape(100, 2, 16):
        total.update(tensors.array(batch, "float64"))
    wide = x.astype(np.longdouble)
    exact = ((wide - wide.mean(axis=0)) ** 2).mean(axis=0)
    assert np.abs(np.diag(tensors.numpy(total.moments().covariance)) / exact - 1).max() <= 2.1 * 2.0**-53


def test_an_accumulator_keeps_no_batch_alive():
    import weakref

    batch = np.ones((5, 2))
    alive = weakref.ref(batch)
    total = MomentAccumulator().update(batch)
    del batch
    assert alive() is None
    assert total.count == 5


RANKS_OF_POINTS = (5, 0, 12)


def accumulate_on_a_rank(rank, folder):
    """One rank of three: its points, an all-reduce, and the moments that it then has, written to `folder`."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(RANKS_OF_POINTS))
    x = np.random.default_rng(0).standard_normal((sum(RANKS_OF_POINTS), 3)) + 1e9
    first = sum(RANKS_OF_POINTS[:rank])
    total = MomentAccumulator(3)
    if RANKS_OF_POINTS[rank]:
        total.update(x[first : first + RANKS_OF_POINTS[rank]])
    total.all_reduce()
    got = total.moments()
    np.savez(f"{folder}/{rank}.npz", x=x, mean=np.asarray(got.mean), cov=np.asarray(got.covariance), count=total.count)
    # a rank without points has no kind of its own: it gets torch tensors
    assert isinstance(got.mean, np.ndarray if RANKS_OF_POINTS[rank] else torch.Tensor)
    distributed.destroy_process_group()


def test_all_reduce_over_ranks_of_different_sizes_even_zero(tmp_path):
    multiprocessing = pytest.importorskip("torch.multiprocessing")
    ranks = len(RANKS_OF_POINTS)
    multiprocessing.start_processes(accumulate_on_a_rank, args=(str(tmp_path),), nprocs=ranks, start_method="fork")
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(len(RANKS_OF_POINTS))]
    expected = moments(ranks[0]["x"])
    for got in ranks:
        assert got["count"] == sum(RANKS_OF_POINTS)
        np.testing.assert_array_equal(got["mean"], ranks[0]["mean"])
        np.testing.assert_array_equal(got["cov"], ranks[0]["cov"])
        np.testing.assert_allclose(got["mean"], expected.mean, rtol=2.3e-16)
        np.testing.assert_allclose(got["cov"], expected.covariance, atol=1e-14)


def test_errors_of_the_accumulator():
    torch = pytest.importorskip("torch")
    total = MomentAccumulator().update(np.ones((2, 3)))
    wrong = [
        (lambda: total.update(np.ones((2, 4))), ValueError, r"points: expected shape \(n, 3\), got \(2, 4\)"),
        (lambda: total.update(np.ones(3)), ValueError, r"points: expected shape \(n, 3\), got \(3,\)"),
        (lambda: total.update(np.ones((2, 3), np.float32)), TypeError, "points: expected the dtype of the first batch"),
        (lambda: total.update(torch.ones(2, 3)), TypeError, "points: expected a numpy array, as the first batch"),
        (lambda: total.update(np.ones((2, 3), np.float16)), TypeError, "points: .*got float16, whose 11 bits"),
        (lambda: total.merge(np.ones(3)), TypeError, "other: expected a MomentAccumulator, got ndarray"),
        (lambda: total.merge(MomentAccumulator(4)), ValueError, "other: expected m = 3 variables, got 4"),
        (lambda: MomentAccumulator(0), ValueError, "m: expected at least 1, got 0"),
        (lambda: MomentAccumulator(3).moments(), ValueError, "expected at least 1 points for ddof = 0, got 0"),
        (lambda: total.moments(ddof=2), ValueError, "expected at least 3 points for ddof = 2, got 2"),
        (lambda: MomentAccumulator().all_reduce(), ValueError, r"needs MomentAccumulator\(m\) before all_reduce"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
    assert total.count == 2
    assert np.array_equal(total.moments().mean, np.ones(3))


@pytest.mark.parametrize(
    ("points", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, r"points: expected a NumPy, CuPy or torch array"),
        (np.ones((3, 2), np.int32), {}, TypeError, r"points: expected dtype float32, float64, got int32"),
        (np.ones((3, 2), np.float16), {}, TypeError, r"points: .*got float16, whose 11 bits"),
        (np.ones(3), {}, ValueError, r"points: expected at least 2 axes \(\.\.\., n, m\), got shape \(3,\)"),
        (np.ones((0, 2)), {}, ValueError, r"points: expected at least 1 points .*got n = 0"),
        (np.ones((1, 2)), {"ddof": 1}, ValueError, r"points: expected at least 2 points .*ddof = 1, got n = 1"),
        (np.ones((3, 2)), {"ddof": 0.5}, TypeError, r"ddof: expected an integer, got 0\.5"),
    ],
)
def test_errors_of_moments(points, options, error, message):
    with pytest.raises(error, match=message):
        moments(points, **options)
