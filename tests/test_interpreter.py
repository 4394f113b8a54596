"""The harness of the Triton kernels: its casts between float32 and bfloat16 are those of PyTorch and of a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
