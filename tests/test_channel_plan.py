"""`kernels/gpu/channel_plan.py`: every tile of batch normalisation, read over a grid of shapes, with no GPU and no kernel."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_plan import ELEMENTS, GRID_X, ITEMSIZES, MODES, SIZES, drawn, lanes, power_of_2

from hw3gpu.kernels.gpu import plan as P
from hw3gpu.kernels.gpu.channel_plan import plan_batch_norm, plan_channels
from hw3gpu.kernels.gpu.device import A100, B200, H100, H200, RTX_4090, RTX_5090

CHANNELS = {
    "N": SIZES, "C": SIZES, "S": SIZES, "itemsize": st.sampled_from(ITEMSIZES), "mode": st.sampled_from(MODES),
    "channels_last": st.booleans(), "operands": st.sampled_from([1, 2]), "whole": st.booleans(),
    "beside": st.sets(st.sampled_from(["busy", "masked", "active"])),
}  # fmt: skip


@drawn
@given(**CHANNELS)
@example(N=2, C=300, S=4, itemsize=4, mode=0, channels_last=False, operands=1, whole=True, beside=set())
@example(N=1, C=2, S=20000, itemsize=4, mode=1, channels_last=False, operands=2, whole=False, beside=set())
@example(N=1, C=64, S=2**20, itemsize=2, mode=0, channels_last=True, operands=2, whole=True, beside=set())
@example(N=64, C=2048, S=49, itemsize=2, mode=2, channels_last=False, operands=2, whole=True, beside=set())
@example(N=1, C=1, S=1, itemsize=8, mode=0, channels_last=False, operands=1, whole=True, beside=set())
def test_plan_batch_norm(N, C, S, itemsize, mode, channels_last, operands, whole, beside):
    if channels_last or 2 * (16 // itemsize) > S:
        mode = P.STRIDED  # a unit stride between channels leaves none between positions; so short a row is nothing but ends
    options = {name: name in beside for name in ("busy", "masked", "active")}
    if "active" in beside:  # with an activation a pass is busy, and its backward pass may read a residual beside dy and x
        operands, options["busy"] = operands + (operands == 2 and "busy" in beside), True
    p = plan_batch_norm(N, C, S, itemsize, mode, channels_last, operands, whole, **options, may_be_flat=not beside)
    for size in (p.BLOCK_C, p.BLOCK_N, p.LANES, p.num_warps):
        assert power_of_2(size)
    assert 1 <= p.num_warps <= 16
    width = lanes(S, itemsize, mode)
    # every channel, sample and position belongs to one tile
    assert p.channel_blocks * p.BLOCK_C >= C > (p.channel_blocks - 1) * p.BLOCK_C
    if p.flat:
        assert p.LANES == 8
        assert p.row_lanes >= width
        assert N * p.row_lanes <= 8 * p.BLOCK_N
        assert p.tiles == 1
    else:
        assert p.lane_blocks * p.LANES >= width > (p.lane_blocks - 1) * p.LANES
        assert p.tiles == P.cdiv(N, p.BLOCK_N) * p.lane_blocks
    assert p.tiles > 1 or p.ROWS >= N, "the rows' ends are of other rows than the body"
    # and every tile to one split, none of them empty: its first value is read
    assert p.splits * p.per_split >= p.tiles > (p.splits - 1) * p.per_split
    assert p.split == (p.per_split, p.splits)
    if mode != P.STRIDED and p.lane_blocks > 1:
        assert p.LANES % (16 // itemsize) == 0
    elements = p.BLOCK_C * p.BLOCK_N * p.LANES
    assert elements <= 16384 // (2 if itemsize == 8 else 1), "a tile that does not fit"
    assert elements <= 32 * p.num_warps * ELEMENTS, "too many elements a thread"


@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize(("N", "S"), [(1, 16384), (4, 4096), (64, 256), (16384, 1), (32, 512)], ids=str)
def test_channels_that_fit_are_one_tile(N, S, itemsize):
    if itemsize == 8:
        S = max(S // 2, 1)
        N = N if S > 1 else N // 2
    for operands in (1, 2):
        p = plan_batch_norm(N, 256, S, itemsize, P.ALIGNED, False, operands, whole=True)
        assert (p.tiles, p.splits) == (1, 1)


def test_an_activation_takes_registers():
    """Whole channels: of half as many values where dy, x and what went into it have 4 bytes, of a quarter off 16 bytes. Split
    ones: smaller programs."""
    active = {"busy": True, "active": True, "may_be_flat": False}

    def fits(S, itemsize, mode, operands):
        return plan_batch_norm(16, 256, S, itemsize, mode, False, operands, whole=True, **active).tiles == 1

    assert fits(1024, 4, P.ALIGNED, 1)
    assert [fits(S, 4, P.ALIGNED, 2) for S in (512, 1024)] == [True, False]
    assert [fits(S, 2, P.ALIGNED, 3) for S in (1024, 1040)] == [True, False]
    off_16_bytes = (257, 4, 1), (257, 2, 2), (513, 4, 1), (513, 2, 2)
    assert [fits(S, itemsize, P.SHIFTED, operands) for S, itemsize, operands in off_16_bytes] == [True, True, False, False]
    beside = [plan_batch_norm(1, 512, 784, size, P.STRIDED, True, 2, whole=True, **active) for size in (2, 4)]
    assert [(p.tiles, p.BLOCK_C * p.LANES) for p in beside] == [(1, 16384), (1, 8192)]
    for itemsize, sums in ((2, True), (2, False), (4, False)):
        long = (128, 256, 3136, itemsize, P.ALIGNED, False, 2)
        plain, other = (plan_batch_norm(*long, whole=False, sums=sums, **more) for more in ({}, active))
        assert other.num_warps < plain.num_warps


@pytest.mark.parametrize("C", [1, 3, 64, 131])
def test_few_long_channels_fill_the_device(C):
    p = plan_batch_norm(1, C, 2**22, 4, P.ALIGNED, False, 1, whole=False)
    assert p.channel_blocks * p.splits >= H100.multiprocessors
    assert p.splits <= 1024


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("C", [16, 132, 192, 256, 300, 512, 1000, 2048])
def test_long_channels_are_split_so_that_a_device_is_filled_evenly(C, sums):
    """However many channels: the multiprocessor with the most tiles has a quarter more than its share, or less."""
    for device in (A100, H100, B200, RTX_4090):
        p = plan_batch_norm(32, C, 56 * 56, 4, P.ALIGNED, False, 1, whole=False, sums=sums, device=device)
        busiest = P.cdiv(p.channel_blocks * p.splits, device.multiprocessors) * p.per_split
        assert busiest <= 1.25 * p.channel_blocks * p.tiles / device.multiprocessors + p.per_split


@pytest.mark.parametrize("itemsize", [2, 4])
def test_long_channels_have_enough_under_way(itemsize):
    """The tiles that a multiprocessor waits for at once are the bytes that its device needs; two programs at least."""
    for device, operands in product((A100, H100, H200, B200, RTX_4090, RTX_5090), (1, 2)):
        p = plan_batch_norm(128, 256, 56 * 56, itemsize, P.ALIGNED, False, operands, whole=False, sums=True, device=device)
        programs = device.registers // (64 * 32 * p.num_warps)
        assert programs * p.stages * p.BLOCK_N * p.LANES * itemsize * operands >= device.in_flight
        assert programs >= 2


def test_many_small_channels_share_a_program_while_the_device_stays_full():
    for C in (1, 131, 263, 264, 1000, 4096, 10**5):
        p = plan_batch_norm(2, C, 4, 4, P.STRIDED, False, 1, whole=True)
        assert p.channel_blocks >= min(C, H100.multiprocessors)
    assert p.BLOCK_C > 1


@pytest.mark.parametrize("operands", [1, 2])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize(
    ("N", "C", "S"), [(1, 1, 2**33), (2**10, 2**10, 2**13), (2**33, 1, 1), (1, 2**33, 1), (2**13, 2**20, 1), (2**20, 2**10, 8)]
)
def test_batch_norm_grids_stay_within_cudas(N, C, S, itemsize, operands):
    """2³³ elements; N samples and S positions that make one run are handed over as one, as the launchers do."""
    if S == 1:
        N, S = 1, N
    for mode in MODES:
        for whole in (True, False):
            p = plan_batch_norm(N, C, S, itemsize, mode, False, operands, whole)
            assert p.channel_blocks * p.splits <= GRID_X
            assert p.channel_blocks * p.tiles <= GRID_X


@drawn
@given(C=SIZES, splits=st.integers(1, 4 * H100.multiprocessors))
def test_plan_channels(C, splits):
    block, programs = plan_channels(C, splits)
    assert power_of_2(block)
    assert programs * block >= C > (programs - 1) * block
    assert block * P.next_power_of_2(splits) <= 1024


def test_plans_are_frozen_values():
    first, again = (plan_batch_norm(2, 3, 4, 4, 0, False, 1, True) for _ in range(2))
    assert first == again
    assert hash(first) == hash(again)
    with pytest.raises(FrozenInstanceError):
        first.BLOCK_C = 1
