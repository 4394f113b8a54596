"""The harness of the Triton kernels: its casts between float32 and bfloat16 are those of PyTorch and of a GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hw3gpu.functional as HF

pytestmark = pytest.mark.interpreter

TIE = 0x8000  # the half of a bfloat16's last place, in the bits of a float32
BFLOAT16 = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)  # every bfloat16, in the bits of a float32


def _random(high: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, 1 << 16, dtype=np.uint32)


def _bits(*patterns: int) -> np.ndarray:
    return np.array(patterns, dtype=np.uint32)


FLOAT32 = {
    "random": _random(2**32),
    "ties": BFLOAT16 | np.uint32(TIE),
    "next to ties": np.concatenate([BFLOAT16 | np.uint32(TIE - 1), BFLOAT16 | np.uint32(TIE + 1)]),
    "subnormal": np.concatenate([_random(2**23), _random(2**23) | np.uint32(0x80000000)]),
    "zeros and the smallest": _bits(0, 0x80000000, 1, 0x80000001, 0x7FFF, TIE, TIE + 1, 0x007FFFFF, 0x00800000),
    "overflow": _bits(0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F7FFF, 0xFF7F8000, 0xFF7FFFFF, 0x7F800000, 0xFF800000),
    "nan": _bits(0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF),
}


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` as `dtype`, cast by a Triton kernel in the interpreter."""
    import triton
    import triton.language as tl

    @triton.jit
    def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < n)
        tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty), mask=offsets < n)

    y = torch.empty_like(x, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), BLOCK=4096)
    return y


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(bits), expected[~nan].view(bits))


@pytest.mark.parametrize("patterns", FLOAT32.values(), ids=FLOAT32.keys())
def test_float32_to_bfloat16_is_rounded_as_pytorch_does(patterns: np.ndarray) -> None:
    x = torch.from_numpy(patterns.view(np.float32).copy())
    _same(_cast(x, torch.bfloat16), x.bfloat16())


def test_every_bfloat16_goes_to_float32_exactly() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    _same(_cast(x, torch.float32), x.float())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_float32_to_float16_is_rounded_as_pytorch_does() -> None:
    x = torch.from_numpy(FLOAT32["random"].view(np.float32).copy())
    _same(_cast(x, torch.float16), x.half())


def test_types_remembered_by_name_are_those_that_triton_makes() -> None:
    import triton.language as tl

    elements = (
        tl.float32,
        tl.float64,
        tl.bfloat16,
        tl.int1,
        tl.uint16,
        tl.pointer_type(tl.float64),
        tl.pointer_type(tl.float32),
    )
    for element in elements * 2:
        for shape in ([4], [2, 8], [tl.constexpr(16)], [8, 2]):
            made = object.__new__(tl.block_type)
            tl.block_type.__init__.__wrapped__(made, element, shape)
            known = tl.block_type(element, shape)
            assert known.element_ty is element
            assert (known.name, known.numel, [*known.shape]) == (made.name, made.numel, [*made.shape])
            assert [other == known for other in elements] == [False] * len(elements)
            tensor, other = (object.__new__(tl.tensor) for _ in range(2))
            tl.tensor.__init__.__wrapped__(tensor, None, known)
            tl.tensor.__init__(other, None, known)
            assert other.type is known
            assert (str(other.shape), str(other.numel), other.dtype) == (str(tensor.shape), str(tensor.numel), tensor.dtype)
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])


def _every_pair() -> list[tuple[str, str, str]]:
    """Operators, and what stands on their two sides."""
    numbers = ["int32", "int64", "float32", "float64"]
    operands = [*numbers, "int1", "bfloat16", "one int32", "one int64", "one float32", "number", "constexpr", "fraction"]
    tensors = [*numbers, "int1", "bfloat16", "one int32", "one int64", "one float32"]
    pairs = [(a, b) for a in [*tensors, "number", "fraction"] for b in operands if a in tensors or b in tensors]
    return [(name, a, b) for name in ("add", "sub", "mul", "lt", "ge", "eq", "and_", "or_") for a, b in pairs]


def test_operators_are_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value and type, at once and by Triton's own way: blocks of one shape and of two, one number, Python's numbers."""
    import operator

    import triton.language as tl
    from triton.runtime import interpreter

    from hw3gpu._cli import interpreter as ours

    def block(values: np.ndarray, dtype: tl.dtype) -> tl.tensor:
        of = tl.block_type(dtype, list(values.shape)) if values.size > 1 else dtype
        return tl.tensor(interpreter.TensorHandle(values, dtype), of)

    def operand(kind: str, column: bool) -> object:
        python = {"number": -3, "constexpr": tl.constexpr(4), "fraction": 0.1}
        if kind in python:
            return python[kind]
        name = kind.removeprefix("one ")
        if name == "bfloat16":
            return block(np.arange(8, dtype=np.uint16) + np.uint16(0x3F80), tl.bfloat16)
        values = np.array([0.1, -3, 2.5, 7, 0, 1e6, -2, 4]).astype("bool" if name == "int1" else name)
        values = values[3:4] if kind != name else values[:, None] if column else values
        return block(values, getattr(tl, name))

    def results() -> dict[object, object]:
        found: dict[object, object] = {}
        scope = interpreter._patch_lang.__wrapped__(SimpleNamespace(__globals__={"tl": tl}))
        try:
            for name, left, right in _every_pair():
                for column in (False, True):
                    a, b = operand(left, column), operand(right, False)
                    try:
                        y = getattr(operator, name)(a, b)
                    except Exception as error:
                        found[name, left, right, column] = type(error)
                    else:
                        found[name, left, right, column] = (
                            y.type.name,
                            [*map(int, y.shape)],
                            y.handle.data.dtype,
                            y.handle.data.tolist(),
                        )
        finally:
            scope.restore()
        return found

    at_once = results()
    calls: list[object] = []
    monkeypatch.setattr(ours, "_at_once", lambda theirs, *_: calls.append(theirs) or theirs)
    by_triton = results()
    assert calls
    for case, result in at_once.items():
        assert result == by_triton[case], case


def test_lanes_that_are_not_finite_are_no_warning(device: str) -> None:
    """As on a GPU; NumPy would warn of each."""
    z = torch.tensor([[torch.inf, torch.inf, 1.0], [3e38, -3e38, 0.0]], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        y = HF.softmax(z, -1)
    assert y[0].isnan().all()
    assert y[1].tolist() == [1.0, 0.0, 0.0]
