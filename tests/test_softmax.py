"""S4 to S7: softmax, its Jacobian, cross entropy, and both fused, against the answer sheet, for every kind of array."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hw3gpu
from hw3gpu import reference
from hw3gpu._arrays import accumulate_dtype
from layouts import Tensors, in_layout, to_torch
from measure import close, largest, max_error, ulp

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# name: (shape, axis, memory layout)
CASES = {
    "V = 1": ((5, 1), -1, "contiguous"),
    "V = 10": ((3, 10), -1, "contiguous"),
    "V = 1000": ((2, 1000), -1, "contiguous"),
    "V = 1001": ((3, 1001), -1, "contiguous"),
    "many short rows": ((70, 7), -1, "contiguous"),
    "one row": ((33,), -1, "contiguous"),
    "axis in the middle": ((2, 10, 7), 1, "contiguous"),
    "axis first": ((6, 5), 0, "contiguous"),
    "(N, C, H, W)": ((2, 5, 3, 4), 1, "contiguous"),
    "channels-last": ((2, 5, 3, 4), 1, "channels-last"),
    "sliced": ((4, 21), -1, "sliced"),
    "off 16 bytes": ((3, 64), -1, "shifted"),
    "backwards": ((3, 64), -1, "reversed"),
    "one number": ((1, 1, 1), 1, "contiguous"),
    "beyond one program": ((2, 33333), -1, "contiguous"),
    "beyond one program, aligned": ((1, 36864), -1, "contiguous"),
    "beyond one program, axis in the middle": ((1, 5000, 3), 1, "contiguous"),
}
LONG = 33333


@pytest.fixture
def tensors(device):
    return Tensors(device)


def hold(name, ours, expected, dtype, theirs, axis, *operands):
    """`close`, with the name of the result in the message and PyTorch's `theirs(*operands)` as the measure.

    On a few numbers PyTorch's error is a matter of luck, so it gets the same input in four orders of the classes: its worst
    error counts.
    """
    error = 0.0
    for k in (0, 1, 2, 5):
        rolled = theirs(*(x.roll(k, axis) for x in operands))
        back = rolled.roll(-k, axis) if rolled.ndim == operands[0].ndim else rolled
        error = max(error, max_error(back.detach().double().cpu().numpy(), expected, dtype))
    try:
        close(ours, expected, error, dtype)
    except AssertionError as message:
        raise AssertionError(f"{name}: {message}") from None


def forward_and_check(kit, z, dtype, axis=-1):
    """softmax(z), held to the answer sheet."""
    y = hw3gpu.softmax(z, axis)
    sheet = reference.softmax(kit.numpy(z), axis)
    hold("y", kit.numpy(y), sheet, dtype, lambda z: F.softmax(z, axis), axis, to_torch(z))
    return y


def backward_and_check(kit, dy, y, dtype, axis=-1):
    dz = hw3gpu.softmax_backward(dy, y, axis)
    sheet = reference.softmax_backward(kit.numpy(dy), kit.numpy(y), axis)

    def theirs(dy, y):
        return torch._softmax_backward_data(dy, y, axis, y.dtype)

    hold("dz", kit.numpy(dz), sheet, dtype, theirs, axis, to_torch(dy), to_torch(y))
    return dz


def torch_fused(z, y):
    """PyTorch's loss and gradient for vectors y, in the precision of z."""
    z = z.detach().requires_grad_()
    # cross_entropy wants its classes second, and gives NaN for 0 · ∞
    log_p = F.log_softmax(z, -1)
    loss = -torch.where(y == 0, 0.0, y * log_p).sum(-1)
    with torch.no_grad():
        dz = F.softmax(z, -1) * y.sum(-1, keepdim=True) - y
    return loss.detach(), dz


def fused_and_check(kit, z, y, dtype):
    """`softmax_cross_entropy`, held to the answer sheet and to PyTorch in the precision of the sums, rounded once."""
    result = hw3gpu.softmax_cross_entropy(z, y)
    acc = accumulate_dtype(z)
    z_t = to_torch(z).to(getattr(torch, acc))
    y_t = to_torch(y)
    hard = y_t.ndim < z_t.ndim
    if hard:
        y_t = F.one_hot(y_t.long(), z_t.shape[-1])
    y_t = y_t.to(z_t.dtype)
    sheet = reference.softmax_cross_entropy(kit.numpy(z), kit.numpy(y).astype(np.int64) if hard else kit.numpy(y))
    hold("loss", kit.numpy(result.loss), sheet.loss, acc, lambda z, y: torch_fused(z, y)[0], -1, z_t, y_t)
    of = getattr(torch, dtype)
    hold("dz", kit.numpy(result.dz), sheet.dz, dtype, lambda z, y: torch_fused(z, y)[1].to(of), -1, z_t, y_t)
    return result


def probabilities(rng, shape):
    y = rng.random(shape) + 0.01
    return y / y.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------------------- softmax
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_of_every_shape_and_layout(tensors, rng, case, dtype):
    shape, axis, layout = CASES[case]
    z = in_layout(tensors, rng.standard_normal(shape), dtype, layout)
    dy = in_layout(tensors, rng.standard_normal(shape), dtype, layout)
    y = forward_and_check(tensors, z, dtype, axis)
    backward_and_check(tensors, dy, y, dtype, axis)


@pytest.mark.parametrize("case", ["V = 1001", "axis in the middle"])
def test_softmax_of_every_kind_and_dtype(kit, rng, case, dtype):
    shape, axis, layout = CASES[case]
    z, dy = (in_layout(kit, rng.standard_normal(shape), dtype, layout) for _ in range(2))
    y = forward_and_check(kit, z, dtype, axis)
    backward_and_check(kit, dy, y, dtype, axis)


def test_softmax_axis_by_default_is_the_last(kit, rng):
    z = kit.array(rng.standard_normal((3, 5)))
    np.testing.assert_array_equal(kit.numpy(hw3gpu.softmax(z)), kit.numpy(hw3gpu.softmax(z, 1)))
    y = hw3gpu.softmax(z)
    np.testing.assert_array_equal(kit.numpy(hw3gpu.softmax_backward(z, y)), kit.numpy(hw3gpu.softmax_backward(z, y, 1)))


@pytest.mark.parametrize("layout", ["sliced", "channels-last", "reversed"])
def test_backward_of_operands_laid_out_apart(tensors, rng, layout):
    """dy and y need not share their strides."""
    y = tensors.array(probabilities(rng, (3, 4, 6)))
    dy = in_layout(tensors, rng.standard_normal((3, 4, 6)), "float32", layout)
    backward_and_check(tensors, dy, y, "float32", 2)
    backward_and_check(tensors, y, dy, "float32", 1)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 3)], ids=str)
def test_softmax_of_nothing(kit, shape):
    z = kit.array(np.zeros(shape))
    assert tuple(hw3gpu.softmax(z).shape) == shape
    assert tuple(hw3gpu.softmax_backward(z, z).shape) == shape


def first_tile_minus_infinity(V):
    z = np.linspace(-3, 3, V)
    z[: V - 300] = -np.inf
    return z


def all_but_one(V):
    z = np.full(V, -np.inf)
    z[V // 2] = -7.25
    return z


def one_far_above(V):
    z = np.linspace(-1, 1, V)
    z[V // 3] = 300.0
    return z


def late_maximum(V):
    """Each tile's maximum is above the last one's: every merge of the running sum is rescaled."""
    return np.linspace(-60, 60, V)


HARD = {
    "first tile all -inf": first_tile_minus_infinity,
    "all -inf but one": all_but_one,
    "every other -inf": lambda V: np.where(np.arange(V) % 2, np.linspace(-2, 2, V), -np.inf),
    "near -200": lambda V: -200.0 + np.linspace(-1, 1, V),
    "near +1e4": lambda V: 1e4 + 40 * np.sin(np.arange(V)),
    "-1e4 to +1e4": lambda V: np.linspace(-1e4, 1e4, V),
    "p near 1": one_far_above,
    "rising": late_maximum,
    "all equal": lambda V: np.full(V, 0.3),
}


@pytest.mark.parametrize("case", HARD, ids=list(HARD))
@pytest.mark.parametrize(("V", "dtype"), [(1001, "float64"), (1001, "float16"), (1001, "bfloat16"), (LONG, "float32")])
def test_softmax_of_hard_rows(tensors, rng, case, V, dtype):
    z = tensors.array(np.stack([HARD[case](V), rng.standard_normal(V)]), dtype)
    dy = tensors.array(rng.standard_normal((2, V)), dtype)
    y = forward_and_check(tensors, z, dtype)
    total = tensors.numpy(y).sum(-1)
    np.testing.assert_allclose(total, 1.0, atol=V * ulp(1.0 / 300, dtype) + ulp(1.0, dtype))
    backward_and_check(tensors, dy, y, dtype)


@pytest.mark.parametrize("V", [10, LONG])
@pytest.mark.parametrize(
    "spoil", [lambda z: np.full_like(z, -np.inf), lambda z: np.where(np.arange(z.size) == 5, np.inf, z),
              lambda z: np.where(np.arange(z.size) == z.size - 1, np.nan, z)], ids=["all -inf", "+inf", "NaN"],
)  # fmt: skip
def test_a_row_without_a_softmax_is_nan_and_alone(tensors, rng, spoil, V):
    """As PyTorch's; the rows beside it are untouched."""
    values = rng.standard_normal((3, V)).astype(np.float32)
    clean = tensors.numpy(hw3gpu.softmax(tensors.array(values)))
    values[1] = spoil(values[1])
    got = tensors.numpy(hw3gpu.softmax(tensors.array(values)))
    assert np.isnan(got[1]).all()
    assert F.softmax(torch.from_numpy(values), -1)[1].isnan().all()
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])


# ---------------------------------------------------------------------------------------------- the Jacobian
@pytest.mark.parametrize("shape", [(4,), (1,), (2, 3, 5), (0, 3), (2, 0)], ids=str)
def test_jacobian(kit, rng, shape, dtype):
    z = kit.array(2 * rng.standard_normal(shape), dtype)
    jacobian = hw3gpu.softmax_jacobian(z)
    assert type(jacobian) is type(z)
    assert jacobian.dtype == z.dtype
    assert tuple(jacobian.shape) == (*shape, shape[-1])
    expected = reference.softmax_jacobian(kit.numpy(z))
    s = F.softmax(to_torch(z).to(getattr(torch, accumulate_dtype(z))), -1)
    theirs = (torch.diag_embed(s) - s[..., :, None] * s[..., None, :]).to(to_torch(z).dtype)
    close(kit.numpy(jacobian), expected, max_error(theirs.double().cpu().numpy(), expected, dtype), dtype)


def test_jacobian_of_a_certain_class(kit, dtype):
    """S (1 - S) where S rounds to 1, and 0 where a class is impossible."""
    z = kit.array([[30.0, 0.0, -np.inf]], dtype)
    jacobian = kit.numpy(hw3gpu.softmax_jacobian(z))
    np.testing.assert_array_equal(jacobian[0, 2], 0.0)
    np.testing.assert_array_equal(jacobian[0, :, 2], 0.0)
    acc = accumulate_dtype(z)
    close(jacobian, reference.softmax_jacobian(kit.numpy(z)), ulp(1.0, acc), dtype)


def test_backward_is_the_jacobian_applied(kit, rng):
    z, dy = (kit.array(rng.standard_normal((3, 6)), "float64") for _ in range(2))
    product = np.einsum("nij,ni->nj", kit.numpy(hw3gpu.softmax_jacobian(z)), kit.numpy(dy))
    got = kit.numpy(hw3gpu.softmax_backward(dy, hw3gpu.softmax(z)))
    np.testing.assert_allclose(got, product, rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------- cross entropy
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 7), (0, 3)], ids=str)
def test_cross_entropy(kit, rng, shape, dtype):
    y, y_hat = (kit.array(probabilities(rng, shape), dtype) for _ in range(2))
    loss = hw3gpu.cross_entropy(y, y_hat)
    acc = accumulate_dtype(y_hat)
    operands = (to_torch(v).to(getattr(torch, acc)) for v in (y, y_hat))
    assert tuple(loss.shape) == shape[:-1]
    assert type(loss) is type(hw3gpu.softmax(y)) or np.ndim(loss) == 0
    assert str(loss.dtype).removeprefix("torch.") == acc
    sheet = reference.cross_entropy(kit.numpy(y), kit.numpy(y_hat))
    hold("loss", kit.numpy(loss), sheet, acc, lambda y, y_hat: -(y * y_hat.log()).sum(-1), -1, *operands)


def test_cross_entropy_counts_zero_times_log_zero_as_zero(kit, dtype):
    y = kit.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype)
    y_hat = kit.array([[0.0, 1.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]], dtype)
    loss = kit.numpy(hw3gpu.cross_entropy(y, y_hat))
    assert loss[0] == 0.0
    assert not math.copysign(1.0, loss[0]) < 0
    assert loss[1] == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75), rel=1e-6)
    assert loss[2] == math.inf


# ---------------------------------------------------------------------------------------------- fused
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


# ---------------------------------------------------------------------------------------------- what comes back
def test_results_have_the_dtypes_promised(kit, rng, dtype):
    z = kit.array(rng.standard_normal((3, 7)), dtype)
    result = hw3gpu.softmax_cross_entropy(z, kit.array([1, 2, 3], "int64"))
    for v in (hw3gpu.softmax(z), hw3gpu.softmax_backward(z, z), result.dz):
        assert type(v) is type(z)
        assert v.dtype == z.dtype
        assert tuple(v.shape) == (3, 7)
    assert type(result.loss) is type(z)
    assert str(result.loss.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.loss = None


def test_half_precision_saturates_only_where_the_result_does(kit):
    """The loss of float16 logits is a float32: beyond float16's range it stays finite."""
    top = largest("float16")
    result = hw3gpu.softmax_cross_entropy(kit.array([[top, -top]], "float16"), kit.array([1], "int64"))
    assert kit.numpy(result.loss)[0] == 2 * top


@pytest.mark.parametrize(("V", "dtype"), [(10, "float16"), (1001, "float32"), (LONG, "float32")])
def test_bitwise_repeatable(tensors, rng, V, dtype):
    z, dy = (tensors.array(rng.standard_normal((2, V)), dtype) for _ in range(2))
    y, t = tensors.array(probabilities(rng, (2, V)), dtype), tensors.array(rng.integers(0, V, 2), "int64")

    def run():
        hard, soft = hw3gpu.softmax_cross_entropy(z, t), hw3gpu.softmax_cross_entropy(z, y)
        out = (hw3gpu.softmax(z), hw3gpu.softmax_backward(dy, y), hard.loss, hard.dz, soft.loss, soft.dz)
        return [tensors.numpy(v) for v in out]

    for first, again in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, again)


# ---------------------------------------------------------------------------------------------- bad input
def ones(kit, shape, dtype="float32"):
    return kit.array(np.ones(shape), dtype)


@pytest.mark.parametrize("function", [hw3gpu.softmax, hw3gpu.softmax_jacobian], ids=lambda f: f.__name__)
def test_bad_logits(kit, function):
    with pytest.raises(TypeError, match=r"z: expected a NumPy, CuPy or torch array, got builtins.list"):
        function([1.0, 2.0])
    with pytest.raises(TypeError, match=r"z: expected dtype float16, bfloat16, float32, float64, got int32"):
        function(ones(kit, (2, 3), "int32"))
    with pytest.raises(TypeError, match=r"z: expected dtype .* got complex64"):
        function(ones(kit, (2, 3), "complex64"))
    with pytest.raises(ValueError, match=r"got (shape \(\)|-1)"):
        function(ones(kit, ()))


@pytest.mark.parametrize(
    ("error", "message", "axis"),
    [
        (ValueError, r"axis: expected an axis of z with shape \(2, 3\), got 2", 2),
        (ValueError, r"axis: expected an axis of z with shape \(2, 3\), got -3", -3),
        (TypeError, r"axis: expected an integer, got 0.5 \(float\)", 0.5),
        (TypeError, r"axis: expected an integer, got False", False),
        (TypeError, r"axis: expected an integer, got None", None),
    ],
)
def test_bad_axis(kit, error, message, axis):
    z = ones(kit, (2, 3))
    with pytest.raises(error, match=message):
        hw3gpu.softmax(z, axis)
    with pytest.raises(error, match=message.replace(" of z ", " of y ")):
        hw3gpu.softmax_backward(z, z, axis)


@pytest.mark.parametrize("function", [hw3gpu.softmax_backward, hw3gpu.cross_entropy], ids=["backward", "cross_entropy"])
def test_two_operands_that_do_not_match(kit, function):
    a, b = ("dy", "y") if function is hw3gpu.softmax_backward else ("y", "y_hat")
    good = ones(kit, (2, 3))
    with pytest.raises(TypeError, match=rf"{a}: expected a NumPy, CuPy or torch array, got builtins.NoneType"):
        function(None, good)
    with pytest.raises(TypeError, match=rf"{b}: expected a NumPy, CuPy or torch array, got builtins.float"):
        function(good, 1.0)
    with pytest.raises(TypeError, match=rf"{a}: expected the dtype of {b}, float32, got float64"):
        function(ones(kit, (2, 3), "float64"), good)
    with pytest.raises(TypeError, match=rf"{b}: expected dtype .* got int64"):
        function(good, ones(kit, (2, 3), "int64"))
    with pytest.raises(ValueError, match=rf"{a}: expected the shape of {b}, \(2, 3\), got \(3, 2\)"):
        function(ones(kit, (3, 2)), good)
    with pytest.raises(ValueError, match=rf"{a}: expected the shape of {b}, \(2, 3\), got \(1, 3\)"):
        function(ones(kit, (1, 3)), good)


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
