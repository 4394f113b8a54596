"""S7: softmax and cross entropy fused, against the answer sheet, for every kind of array."""

from __future__ import annotations

import math

import numpy as np
import pytest
from answers import CASES, HARD, LONG, fused_and_check, ones, probabilities

import hw3gpu
from hw3gpu import reference
from hw3gpu._core.arrays import accumulate_dtype
from layouts import in_layout
from measure import ulp

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("kind", ["classes", "vectors"])
@pytest.mark.parametrize(
    "case", ["V = 1", "V = 10", "V = 1001", "many short rows", "one row", "(N, C, H, W)", "sliced", "off 16 bytes",
             "backwards", "beyond one program"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_of_every_shape_and_layout(tensors, rng, case, kind, dtype):
    shape, _, layout = CASES[case]
    z = in_layout(tensors, rng.standard_normal(shape), dtype, layout)
    if kind == "classes":
        y = tensors.array(rng.integers(0, shape[-1], shape[:-1]), "int64")
    else:
        y = in_layout(tensors, probabilities(rng, shape), dtype, layout)
    fused_and_check(tensors, z, y, dtype)


@pytest.mark.parametrize("kind", ["classes", "vectors"])
@pytest.mark.parametrize("V", [10, 1001])
def test_fused_of_every_kind_and_dtype(kit, rng, V, kind, dtype):
    z = kit.array(rng.standard_normal((2, V)), dtype)
    y = kit.array(rng.integers(0, V, 2), "int32") if kind == "classes" else kit.array(probabilities(rng, (2, V)), dtype)
    fused_and_check(kit, z, y, dtype)


@pytest.mark.parametrize("kind", ["classes", "vectors"])
@pytest.mark.parametrize("case", HARD, ids=list(HARD))
@pytest.mark.parametrize(("V", "dtype"), [(LONG, "float32"), (1001, "bfloat16"), (1001, "float64")])
def test_fused_of_hard_rows(tensors, rng, case, kind, V, dtype):
    z = np.stack([HARD[case](V), 1e4 + rng.standard_normal(V)])
    t = np.array([np.argmax(np.where(np.isfinite(z[0]), z[0], -np.inf)), V - 1])
    y = tensors.array(t, "int64")
    if kind == "vectors":
        vectors = np.where(np.isfinite(z), rng.random(z.shape), 0.0)
        y = tensors.array(vectors / vectors.sum(-1, keepdims=True), dtype)
    result = fused_and_check(tensors, tensors.array(z, dtype), y, dtype)
    assert np.isfinite(tensors.numpy(result.loss)).all()


@pytest.mark.parametrize("total", [0.0, 0.25, 3.0, -1.0])
def test_vectors_that_do_not_sum_to_one(kit, rng, total, dtype):
    """dz = ŷ Σy - y, not ŷ - y."""
    V = 10
    y = probabilities(rng, (2, V)) * total
    y[:, 0] += 1e-3  # no vector is zero throughout
    fused_and_check(kit, kit.array(rng.standard_normal((2, V)), dtype), kit.array(y, dtype), dtype)


def test_vectors_of_zeros(kit, rng):
    z = kit.array(rng.standard_normal((2, 9)))
    result = hw3gpu.softmax_cross_entropy(z, kit.array(np.zeros((2, 9))))
    np.testing.assert_array_equal(kit.numpy(result.loss), 0.0)
    np.testing.assert_array_equal(kit.numpy(result.dz), 0.0)


@pytest.mark.parametrize("gap", [2.0, 6.0, 9.0, 14.0])
def test_the_gradient_at_a_nearly_certain_target(kit, gap, dtype):
    """p - 1 is subtracted before it is rounded: relative to itself, dz at the target is as exact as any other number."""
    z = kit.array([[gap, 0.0, 0.0, -1.0]] * 2, dtype)
    classes, vectors = kit.array([0, 0], "int64"), kit.array([[1.0, 0.0, 0.0, 0.0]] * 2, dtype)
    for y in (classes, vectors):
        got = kit.numpy(hw3gpu.softmax_cross_entropy(z, y).dz)[:, 0]
        expected = reference.softmax_cross_entropy(kit.numpy(z), np.array([0, 0])).dz[:, 0]
        # p carries an error of a few units in the precision of the sums
        np.testing.assert_allclose(got, expected, rtol=0, atol=ulp(expected[0], dtype) + 2 * ulp(1.0, accumulate_dtype(z)))


def test_a_row_of_nothing_but_minus_infinity_is_nan_and_alone(kit, rng):
    values = rng.standard_normal((3, 6))
    values[1] = -np.inf
    z = kit.array(values)
    for y in (kit.array([1, 2, 3], "int64"), kit.array(probabilities(rng, (3, 6)))):
        result = hw3gpu.softmax_cross_entropy(z, y)
        assert np.isnan(kit.numpy(result.loss)[1])
        assert np.isnan(kit.numpy(result.dz)[1]).all()
        assert np.isfinite(kit.numpy(result.loss)[[0, 2]]).all()
        assert np.isfinite(kit.numpy(result.dz)[[0, 2]]).all()


def test_a_target_of_probability_zero_costs_infinity(kit):
    z = kit.array([[0.0, -np.inf, 1.0]])
    for y in (kit.array([1], "int64"), kit.array([[0.0, 1.0, 0.0]])):
        result = hw3gpu.softmax_cross_entropy(z, y)
        assert kit.numpy(result.loss)[0] == math.inf
        np.testing.assert_allclose(kit.numpy(result.dz)[0], [1 / (1 + math.e), -1.0, math.e / (1 + math.e)], rtol=1e-6)


@pytest.mark.parametrize("integers", ["uint8", "int8", "int16", "int32", "int64"])
def test_classes_of_every_integer_dtype(kit, rng, integers):
    z, t = kit.array(rng.standard_normal((4, 9))), np.array([0, 8, 3, 8])
    result = hw3gpu.softmax_cross_entropy(z, kit.array(t, integers))
    expected = hw3gpu.softmax_cross_entropy(z, kit.array(t, "int64"))
    np.testing.assert_array_equal(kit.numpy(result.loss), kit.numpy(expected.loss))
    np.testing.assert_array_equal(kit.numpy(result.dz), kit.numpy(expected.dz))


@pytest.mark.parametrize("vectors", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_vectors_of_another_dtype(kit, rng, dtype, vectors):
    if vectors not in kit.dtypes:
        vectors = "float16"  # arrays of this kind have no bfloat16
    z, y = kit.array(rng.standard_normal((2, 21)), dtype), kit.array(probabilities(rng, (2, 21)), vectors)
    fused_and_check(kit, z, y, dtype)


@pytest.mark.parametrize("layout", ["sliced", "shifted", "reversed"])
def test_vectors_laid_out_apart_from_the_logits(tensors, rng, layout):
    z = tensors.array(rng.standard_normal((3, 21)))
    fused_and_check(tensors, z, in_layout(tensors, probabilities(rng, (3, 21)), "float32", layout), "float32")


def test_strided_classes(tensors, rng):
    z, t = tensors.array(rng.standard_normal((2, 3, 5))), rng.integers(0, 5, (2, 3))
    y = in_layout(tensors, t, "float64", "sliced")
    wide = tensors.array(np.repeat(t, 2, axis=1), "int64")[:, ::2]
    assert y.shape == wide.shape
    fused_and_check(tensors, z, wide, "float32")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3)], ids=str)
def test_fused_of_no_rows(kit, shape):
    z = kit.array(np.zeros(shape))
    for y in (kit.array(np.zeros(shape[:-1]), "int64"), z):
        result = hw3gpu.softmax_cross_entropy(z, y)
        assert tuple(result.loss.shape) == shape[:-1]
        assert tuple(result.dz.shape) == shape


def test_fused_without_classes(kit):
    """Rows of no logits: a vector costs nothing, a class cannot be meant."""
    z = kit.array(np.zeros((3, 0)))
    result = hw3gpu.softmax_cross_entropy(z, z)
    np.testing.assert_array_equal(kit.numpy(result.loss), 0.0)
    assert tuple(result.dz.shape) == (3, 0)
    with pytest.raises(ValueError, match="y: expected classes"):
        hw3gpu.softmax_cross_entropy(z, kit.array([0, 0, 0], "int64"))


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("error", "message", "target"),
    [
        (TypeError, r"y: expected a NumPy, CuPy or torch array, got builtins.list", lambda a: [0, 1]),
        (TypeError, r"y: expected integer classes .* got float32", lambda a: a((2,))),
        (TypeError, r"y: expected integer classes .* got bool", lambda a: a((2,), "bool")),
        (TypeError, r"y: expected dtype .* got int64", lambda a: a((2, 3), "int64")),
        (ValueError, r"y: expected shape \(2,\) \(one class per row of z\), got \(3,\)", lambda a: a((3,), "int64")),
        (ValueError, r"y: expected the shape of z, \(2, 3\), got \(2, 4\)", lambda a: a((2, 4))),
    ],
)
def test_bad_targets(kit, error, message, target):
    with pytest.raises(error, match=message):
        hw3gpu.softmax_cross_entropy(ones(kit, (2, 3)), target(lambda shape, dtype="float32": ones(kit, shape, dtype)))


@pytest.mark.parametrize("rank", [0, 3])
def test_targets_of_the_wrong_rank(kit, rank):
    with pytest.raises((TypeError, ValueError), match=r"y: expected .*got"):
        hw3gpu.softmax_cross_entropy(ones(kit, (2, 3)), ones(kit, (2, 3, 1)[:rank], "int64"))


@pytest.mark.parametrize("bad", [-1, 4, -100, 2**31, -(2**62), 2**62], ids=str)
@pytest.mark.parametrize("where", [0, 5])
def test_a_class_out_of_range_is_named(kit, rng, bad, where):
    t = rng.integers(0, 4, (2, 3))
    t.reshape(-1)[where] = bad
    with pytest.raises(ValueError, match=rf"y: expected classes in 0…3, got {bad} in row {where}"):
        hw3gpu.softmax_cross_entropy(kit.array(rng.standard_normal((2, 3, 4))), kit.array(t, "int64"))


def test_the_first_class_out_of_range_is_the_one_named(kit, rng):
    t = np.array([0, 1, 9, -5, 2, 11] * 40)
    with pytest.raises(ValueError, match=r"got 9 in row 2$"):
        hw3gpu.softmax_cross_entropy(kit.array(rng.standard_normal((240, 4))), kit.array(t, "int64"))
