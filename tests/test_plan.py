"""`kernels/gpu/plan.py` and `row_plan.py`: every block size, read over a grid of shapes, with no GPU and no kernel."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hw3gpu.kernels.gpu import plan as P
from hw3gpu.kernels.gpu import row_plan as R
from hw3gpu.kernels.gpu.device import A100, B200, H100, RTX_4090, RTX_5090

drawn = settings(max_examples=200, derandomize=True, deadline=None)

ITEMSIZES = (2, 4, 8)
MODES = (P.STRIDED, P.ALIGNED, P.SHIFTED)
NEAR_POWERS_OF_2 = [2**k + d for k in range(1, 31) for d in (-1, 0, 1)]
SIZES = st.one_of(st.integers(1, 64), st.integers(1, 200_000), st.sampled_from(NEAR_POWERS_OF_2))
GRID_X = 2**31 - 1
# elements of a tile that a thread holds; tests/test_evidence.py compiles what this allows and finds no spill
ELEMENTS = 64


def power_of_2(n):
    return n > 0 and n & (n - 1) == 0


def lanes(V, itemsize, mode):
    """A row that begins anywhere has whole 16-byte groups, and ends that are not in the tile."""
    return V // (16 // itemsize) * (16 // itemsize) if mode == P.SHIFTED else V


# ---------------------------------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize("n", [*range(-2, 70), 2**31 - 1, 2**31, 2**31 + 1, 2**40])
def test_next_power_of_2(n):
    p = P.next_power_of_2(n)
    assert power_of_2(p)
    assert p >= n
    assert p == 1 or p // 2 < n


def test_cdiv():
    for a, b in [*product(range(20), range(1, 6)), (2**62 + 1, 3)]:
        assert P.cdiv(a, b) == -((-a) // b)
        assert 0 <= P.cdiv(a, b) * b - a < b


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-5, 0.1, 1 / 3, 1e300, 5e-324, math.inf, -7.25])
def test_float_and_bits(value):
    number, bits = P.float_and_bits(value)
    assert number == value
    assert -(2**63) <= bits < 2**63
    assert bits == int(np.float64(value).view(np.int64))


# ---------------------------------------------------------------------------------------------- how rows are accessed
@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        (P.ALIGNED, ([0, 1024], 4, 1000, 1, [(1000,), (1000,)])),
        (P.ALIGNED, ([16], 2, 64, 1, [(640, 64)])),
        (P.SHIFTED, ([0], 4, 1001, 1, [(1001,)])),
        (P.SHIFTED, ([0], 2, 50257, 1, [(50257,)])),
        (P.SHIFTED, ([0], 4, 1000, 1, [(1002,)])),  # rows begin off 16 bytes
        (P.SHIFTED, ([0], 4, 49, 1, [(98, 49)])),
        (P.STRIDED, ([4], 4, 1000, 1, [(1000,)])),  # the tensor itself begins off 16 bytes
        (P.STRIDED, ([0, 8], 4, 1000, 1, [(1000,), (1000,)])),
        (P.STRIDED, ([0], 4, 1000, 2, [(2000,)])),
        (P.STRIDED, ([0], 4, 1000, 0, [(1,)])),
        (P.STRIDED, ([0, 0], 4, 1001, 1, [(1001,), (1004,)])),  # two tensors whose rows shift apart
        (P.STRIDED, ([0], 4, 7, 1, [(7,)])),  # hardly a whole group
        (P.ALIGNED, ([0], 8, 2, 1, [(2,)])),
    ],
    ids=str,
)
def test_row_mode(mode, arguments):
    assert P.row_mode(*arguments) == mode


@drawn
@given(st.data())
def test_no_mode_but_strided_without_alignment(data):
    """ALIGNED means that each row begins and ends on 16 bytes; SHIFTED that all tensors' rows begin alike."""
    itemsize = data.draw(st.sampled_from(ITEMSIZES))
    count, stride = data.draw(st.integers(1, 64)), data.draw(st.sampled_from([0, 1, 1, 1, 2]))
    addresses = data.draw(st.lists(st.sampled_from([0, 16, 32, 4, 8]), min_size=1, max_size=3))
    steps = [tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=1))) for _ in addresses]
    mode = P.row_mode(addresses, itemsize, count, stride, steps)
    starts = [(address + i * step[0] * itemsize) % 16 for address, step in zip(addresses, steps, strict=True) for i in range(5)]
    if mode == P.ALIGNED:
        assert stride == 1
        assert not any(starts)
        assert count * itemsize % 16 == 0
    if mode == P.SHIFTED:
        assert stride == 1
        assert len(set(zip(*[iter(starts)] * 5, strict=True))) == 1


# ---------------------------------------------------------------------------------------------- rows
EXTRA_PER_LANE = (0, 1, 2)
ROWS = {
    "V": SIZES, "S": SIZES, "itemsize": st.sampled_from(ITEMSIZES), "mode": st.sampled_from(MODES), "unit_s": st.booleans()
}  # fmt: skip


@drawn
@given(**ROWS, extra_per_lane=st.sampled_from(EXTRA_PER_LANE), dense=st.booleans())
@example(V=1, S=1, itemsize=4, mode=P.STRIDED, unit_s=False, extra_per_lane=0, dense=False)
@example(V=32768, S=1, itemsize=2, mode=P.ALIGNED, unit_s=False, extra_per_lane=0, dense=False)
@example(V=50257, S=1, itemsize=2, mode=P.SHIFTED, unit_s=False, extra_per_lane=1, dense=True)
@example(V=5, S=2**30, itemsize=2, mode=P.STRIDED, unit_s=True, extra_per_lane=1, dense=False)
def test_plan_rows(V, S, itemsize, mode, unit_s, extra_per_lane, dense):
    p = R.plan_rows(V, S, itemsize, mode, unit_s, extra_per_lane, dense)
    for size in (p.BLOCK_R, p.KEEP, p.BLOCK_V, p.num_warps):
        assert power_of_2(size)
    assert 1 <= p.num_warps <= 16
    group = 16 // itemsize
    if p.FITS:
        width = max(lanes(V, itemsize, mode), 1)
        assert width <= p.KEEP, "lanes are left out"
        assert 2 * width > p.KEEP, "half of the lanes are idle"
    else:
        steps = P.cdiv(V - p.KEEP, p.BLOCK_V)  # as the kernels count them
        assert steps >= 1
        assert p.KEEP + steps * p.BLOCK_V >= lanes(V, itemsize, mode), "lanes are left out"
        if mode != P.STRIDED:
            assert p.KEEP % group == 0, "the tail begins within a 16-byte group"
            assert p.BLOCK_V % group == 0
        assert p.BLOCK_V <= p.KEEP
    elements = p.BLOCK_R * p.KEEP
    assert elements <= 32 * p.num_warps * ELEMENTS, "too many elements a thread"
    assert p.BLOCK_R < 2 * S, "rows that are not there"


@pytest.mark.parametrize(
    ("extra_per_lane", "mode", "itemsize", "longest"),
    [
        pytest.param(0, P.ALIGNED, 4, 32768, id="hard targets, float32"),
        pytest.param(0, P.ALIGNED, 2, 32768, id="hard targets, halves"),
        pytest.param(0, P.SHIFTED, 4, 32771, id="hard targets, float32, off 16 bytes"),
        pytest.param(0, P.SHIFTED, 2, 32775, id="hard targets, halves, off 16 bytes"),
        pytest.param(0, P.ALIGNED, 8, 8192, id="hard targets, float64"),
        pytest.param(1, P.SHIFTED, 4, 16387, id="softmax backward"),
        pytest.param(1, P.ALIGNED, 4, 16384, id="soft targets, weights or smoothing"),
        pytest.param(1, P.SHIFTED, 4, 16387, id="soft targets, weights or smoothing, off 16 bytes"),
        pytest.param(1, P.SHIFTED, 2, 16391, id="softcap, halves, off 16 bytes"),
        pytest.param(2, P.ALIGNED, 4, 8192, id="smoothing and softcap"),
        pytest.param(0, P.STRIDED, 4, 8192, id="hard targets, with a stride"),
        pytest.param(1, P.STRIDED, 4, 4096, id="soft targets, with a stride"),
        pytest.param(1, P.STRIDED, 8, 2048, id="soft targets, float64, with a stride"),
    ],
)
def test_rows_up_to_the_promised_length_are_read_once(extra_per_lane, mode, itemsize, longest):
    assert R.plan_rows(longest, 1, itemsize, mode, False, extra_per_lane).FITS
    assert not R.plan_rows(longest + 1, 1, itemsize, mode, False, extra_per_lane).FITS


def test_many_short_rows_share_a_program():
    assert R.plan_rows(10, 4096, 4, P.STRIDED, False).BLOCK_R == 128
    assert R.plan_rows(1, 10**6, 4, P.STRIDED, False).BLOCK_R == 2048
    assert R.plan_rows(1000, 4096, 4, P.ALIGNED, False).BLOCK_R == 4
    assert R.plan_rows(10, 3, 4, P.STRIDED, False).BLOCK_R == 4


@pytest.mark.parametrize(
    ("V", "widths", "fits"),
    [
        pytest.param(19, (128, 128, 128), True, id="19 classes of segmentation"),
        pytest.param(128, (32, 64, 64), True, id="128 classes"),
        pytest.param(1000, (64, 128, 128), False, id="1000 classes"),
    ],
)
def test_neighbouring_rows_fill_a_line_or_at_least_a_sector(V, widths, fits):
    """With the class axis in the middle a program reads neighbours along S together: sectors of 32 bytes, lines of 128."""
    for itemsize, width in zip(ITEMSIZES, widths, strict=True):
        p = R.plan_rows(V, 3136, itemsize, P.STRIDED, True)
        assert (p.BLOCK_R * itemsize, p.FITS) == (width, fits)


@drawn
@given(
    **ROWS, extra_per_lane=st.sampled_from(EXTRA_PER_LANE), tensors=st.sampled_from([1, 2]),
    device=st.sampled_from([A100, H100, B200, RTX_4090, RTX_5090]),
)  # fmt: skip
@example(V=32000, S=1, itemsize=2, mode=P.ALIGNED, unit_s=False, extra_per_lane=0, tensors=1, device=H100)
@example(V=16384, S=1, itemsize=4, mode=P.ALIGNED, unit_s=False, extra_per_lane=0, tensors=1, device=RTX_5090)
def test_persistent_programs_are_all_on_the_device_at_once(V, S, itemsize, mode, unit_s, extra_per_lane, tensors, device):
    """Their registers, threads and the rows on their way fit the device's, and there are two rows on their way or programs."""
    p = R.plan_rows(V, S, itemsize, mode, unit_s, extra_per_lane, tensors=tensors, device=device)
    if p.programs:
        each, rest = divmod(p.programs, device.multiprocessors)
        assert rest == 0
        assert each * p.num_warps * 32 <= device.threads
        assert each * p.num_warps * 32 * p.registers <= device.registers
        ahead = (p.STAGES - 1) * p.KEEP * itemsize * tensors
        assert each * ahead < device.shared_memory
        assert each > 1 or p.STAGES > 2
        assert (p.BLOCK_R, p.FITS) == (1, True)
        assert p.grid(5) == 5
        assert p.grid(10**6) == p.programs


@pytest.mark.parametrize(
    ("V", "itemsize", "extra_per_lane", "each"),
    [(8192, 2, 0, 3), (16384, 4, 0, 2), (32000, 2, 0, 1), (32000, 4, 0, 0), (8192, 4, 1, 2), (16384, 2, 1, 1), (4096, 4, 0, 0)],
)
def test_rows_in_turn_on_an_h100(V, itemsize, extra_per_lane, each):
    p = R.plan_rows(V, 1, itemsize, P.ALIGNED, False, extra_per_lane, tensors=1 + extra_per_lane)
    assert p.programs == each * 132


@drawn
@given(**ROWS, extra_per_lane=st.sampled_from(EXTRA_PER_LANE), rows_ahead=st.sampled_from((0, 1)))
def test_nothing_of_a_long_row_stays_that_is_not_needed_again(V, S, itemsize, mode, unit_s, extra_per_lane, rows_ahead):
    p = R.plan_rows(V, S, itemsize, mode, unit_s, extra_per_lane, row_reused=False, rows_ahead=0)
    grouped = R.plan_rows(V, S, itemsize, mode, unit_s, extra_per_lane, row_reused=False, rows_ahead=rows_ahead)
    kept = R.plan_rows(V, S, itemsize, mode, unit_s, extra_per_lane)
    if grouped != p and lanes(V, itemsize, mode) <= 4096:  # a loss without options: fewer warps, up to 64 values a thread
        assert (rows_ahead, extra_per_lane, mode == P.STRIDED) == (1, 0, False)
        assert replace(grouped, num_warps=p.num_warps) == p
        assert grouped.num_warps < p.num_warps
        assert 64 * 32 * grouped.num_warps >= grouped.BLOCK_R * grouped.KEEP
    elif grouped != p:  # two numbers an access of 8 logits
        assert rows_ahead, "only where the registers are not taken"
        assert (itemsize, extra_per_lane, mode == P.STRIDED) == (2, 0, False)
        assert (grouped.KEEP, grouped.FITS, grouped.BLOCK_R) == (0, False, 1)
        assert grouped.BLOCK_V // (32 * grouped.num_warps) <= ELEMENTS
    if unit_s and S > 1:
        assert p == kept
    elif lanes(V, itemsize, mode) <= 4096:
        assert p.num_warps * kept.BLOCK_R == kept.num_warps * p.BLOCK_R, "as many numbers a thread"
        assert p.num_warps <= 4 or p.BLOCK_R == 1, "and many programs"
        assert replace(p, num_warps=kept.num_warps, BLOCK_R=kept.BLOCK_R) == kept
    else:
        assert (p.KEEP, p.FITS, p.num_warps) == (0, False, 4)
        assert 4 <= p.BLOCK_V // (32 * p.num_warps) <= 16, "five numbers a lane fit the registers of many programs"


@drawn
@given(**ROWS)
def test_plan_columns(V, S, itemsize, mode, unit_s):
    p = R.plan_columns(V, S, itemsize, mode, unit_s)
    for size in (p.BLOCK_R, p.BLOCK_V, p.num_warps):
        assert power_of_2(size)
    assert p.BLOCK_V * p.columns >= lanes(V, itemsize, mode), "lanes are left out"
    assert p.BLOCK_V * (p.columns - 1) < lanes(V, itemsize, mode), "a program has nothing to do"
    assert p.BLOCK_R * p.BLOCK_V <= 4096
    assert p.BLOCK_R < 2 * S
    if p.columns > 1:
        assert p.BLOCK_V % (16 // itemsize) == 0
    if mode != P.STRIDED and itemsize < 8:
        light = R.plan_columns(V, S, itemsize, mode, unit_s, light=True, device=B200)
        assert replace(light, num_warps=p.num_warps) == p
        assert p.num_warps == max(p.BLOCK_R * p.BLOCK_V * itemsize // 2048, 1), "64 bytes a thread"
        fewer = itemsize == 2 and p.BLOCK_R == 1 and p.num_warps > 1
        assert light.num_warps * (1 + fewer) == p.num_warps, "and 128 where instructions are the limit"
        more = 2 if itemsize == 2 and mode == P.ALIGNED and p.BLOCK_R == 1 and p.BLOCK_V > 512 else 1
        light = R.plan_columns(V, S, itemsize, mode, unit_s, light=True, device=H100)
        assert light == replace(p, num_warps=more * p.num_warps), "and 32 of aligned halves"


@pytest.mark.parametrize(
    ("device", "V", "itemsize", "rows_ahead", "keep", "block_v", "num_warps"),
    [
        (B200, 128256, 2, 1, 4096, 4096, 4),  # a loss, two rows of each multiprocessor fit in L2
        (B200, 50257, 4, 1, 8192, 4096, 4),
        (B200, 50257, 2, 2, 32768, 16384, 16),  # a softmax
        (B200, 128256, 4, 1, 32768, 8192, 16),
        (H100, 50257, 2, 1, 32768, 16384, 16),
        (H100, 128256, 2, 2, 8192, 8192, 16),  # two programs a multiprocessor
        (RTX_5090, 128256, 2, 2, 32768, 16384, 16),
        (A100, 50257, 4, 1, 32768, 8192, 16),
    ],
)
def test_programs_are_small_where_the_cache_holds_their_rows(device, V, itemsize, rows_ahead, keep, block_v, num_warps):
    p = R.plan_rows(V, 1, itemsize, R.ALIGNED, False, rows_ahead=rows_ahead, device=device)
    assert (p.KEEP, p.BLOCK_V, p.num_warps, p.programs) == (keep, block_v, num_warps, 0)


@pytest.mark.parametrize("V", [1, 2, 10, 1000, 50257, 128256, 2**20])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("extra_per_lane", EXTRA_PER_LANE)
def test_row_grids_stay_within_cudas(V, itemsize, extra_per_lane):
    """2³³ elements, row after row."""
    rows = 2**33 // V
    for mode in MODES:
        p, c = R.plan_rows(V, rows, itemsize, mode, False, extra_per_lane), R.plan_columns(V, rows, itemsize, mode, False)
        assert P.cdiv(rows, p.BLOCK_R) <= GRID_X
        assert P.cdiv(rows, c.BLOCK_R) * c.columns <= GRID_X


# ---------------------------------------------------------------------------------------------- sums
@pytest.mark.parametrize("rows", [0, 1, 2, 1023, 1024, 1025, 8192, 8193, 10**6, 2**23, 2**23 + 1, 2**31, 2**33])
def test_plan_reduce(rows):
    p = R.plan_reduce(rows)
    assert p.programs * p.per_program >= rows
    assert p.per_program % R.SUMMED == 0
    assert p.programs <= p.MERGE <= 1024
    assert power_of_2(R.SUMMED)
    assert power_of_2(p.MERGE)


# ---------------------------------------------------------------------------------------------- as a whole
def test_plans_are_frozen_values():
    for make in (
        lambda: R.plan_rows(10, 3, 4, 0, False),
        lambda: R.plan_columns(10, 3, 4, 0, False),
        lambda: R.plan_reduce(5),
    ):
        first, again = make(), make()
        assert first == again
        assert hash(first) == hash(again)
        with pytest.raises(FrozenInstanceError):
            setattr(first, fields(first)[0].name, 1)


def test_reading_a_plan_loads_no_triton():
    code = "import sys, hw3gpu.kernels.gpu.channel_plan; assert not {'torch', 'triton', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
