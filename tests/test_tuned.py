"""Plans from a table of what was measured: which entries count, and which are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from hw3gpu.kernels.gpu import plan as P
from hw3gpu.kernels.gpu import tuned
from hw3gpu.kernels.gpu.channel_plan import plan_batch_norm
from hw3gpu.kernels.gpu.device import A100, H100
from hw3gpu.kernels.gpu.row_plan import plan_rows

ROWS = {"V": 65536, "S": 1, "itemsize": 4, "mode": P.ALIGNED, "unit_s": False, "extra_per_lane": 0, "dense": False}
ROWS |= {"tensors": 1, "row_reused": True, "rows_ahead": 2}
CHANNELS = {"N": 32, "C": 256, "S": 3136, "itemsize": 4, "mode": P.ALIGNED, "channels_last": False, "operands": 1}
CHANNELS |= {"whole": False, "may_be_flat": True, "busy": False, "sums": True, "masked": False, "active": False}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table, which is then read."""

    def write(*entries, device="H100"):
        file = tmp_path / "tuned.json"
        file.write_text(json.dumps({device: list(entries)}))
        monkeypatch.setattr(tuned, "FILE", file)
        tuned._table.cache_clear()

    yield write
    monkeypatch.undo()
    tuned._table.cache_clear()


def entry(plan, given, use, of):
    return {"plan": plan, "given": given, "instead_of": asdict(of), "use": use}


def test_an_entry_counts_for_its_device_and_its_arguments(table):
    before = plan_rows(**ROWS)
    table(entry("plan_rows", ROWS, {"num_warps": 8}, before))
    assert plan_rows(**ROWS) == replace(before, num_warps=8)
    assert plan_rows(**ROWS, device=H100) == replace(before, num_warps=8)
    assert plan_rows(**ROWS, device=A100).num_warps == 16
    assert plan_rows(**ROWS | {"V": 65540}).num_warps == 16


def test_an_entry_counts_as_long_as_the_plan_is_that_which_it_was_measured_against(table):
    before = plan_rows(**ROWS)
    table(entry("plan_rows", ROWS, {"num_warps": 8}, replace(before, BLOCK_V=4096)))
    assert plan_rows(**ROWS) == before


def test_without_a_table_plans_are_those_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FILE", tmp_path / "none.json")
    tuned._table.cache_clear()
    assert plan_rows(**ROWS).num_warps == 16


def test_what_depends_on_a_tile_follows_it(table):
    before = plan_batch_norm(**CHANNELS)
    assert before.tiles > 1
    table(entry("plan_batch_norm", CHANNELS, {"BLOCK_N": 2 * before.BLOCK_N, "splits": 2}, before))
    plan = plan_batch_norm(**CHANNELS)
    assert plan.BLOCK_N == plan.ROWS == 2 * before.BLOCK_N
    assert plan.BLOCK_N * plan.tiles // plan.lane_blocks >= 32
    assert plan.splits == 2
    assert plan.per_split * plan.splits >= plan.tiles > plan.per_split * (plan.splits - 1)
    assert plan.halvings == before.halvings


FITS = plan_rows(**ROWS | {"V": 1024})
LONG = plan_rows(**ROWS)
NORM = plan_batch_norm(**CHANNELS)
ONE_TILE = CHANNELS | {"N": 2, "S": 64, "whole": True, "sums": False}
WRONG = {
    "more than stays without a spill": ("plan_rows", ROWS, {"KEEP": 2 * LONG.KEEP}, LONG),
    "no power of two": ("plan_rows", ROWS, {"BLOCK_V": 3000}, LONG),
    "a loop's tile of few lanes": ("plan_rows", ROWS, {"BLOCK_V": 64}, LONG),
    "a loop's tile beyond what stays": ("plan_rows", ROWS, {"BLOCK_V": 2 * LONG.KEEP}, LONG),
    "a row that no longer fits": ("plan_rows", ROWS | {"V": 1024}, {"FITS": False}, FITS),
    "lanes of a row that fits": ("plan_rows", ROWS | {"V": 1024}, {"KEEP": 512}, FITS),
    "stages without a loop": ("plan_rows", ROWS | {"V": 1024}, {"STAGES": 2}, FITS),
    "too many registers": ("plan_rows", ROWS, {"registers": 256}, LONG),
    "warps of no block": ("plan_rows", ROWS, {"num_warps": 64}, LONG),
    "a number in quotes": ("plan_rows", ROWS, {"num_warps": "8"}, LONG),
    "the same plan": ("plan_rows", ROWS, {"num_warps": LONG.num_warps}, LONG),
    "nothing": ("plan_rows", ROWS, {}, LONG),
    "less care": ("plan_batch_norm", CHANNELS, {"halvings": 5}, NORM),
    "channels of a tile": ("plan_batch_norm", CHANNELS, {"BLOCK_C": 2}, NORM),
    "more splits than a merge takes": ("plan_batch_norm", CHANNELS, {"splits": 2048}, NORM),
    "a tile that nothing holds": ("plan_batch_norm", CHANNELS, {"LANES": 32768}, NORM),
    "splits of one tile": ("plan_batch_norm", ONE_TILE, {"splits": 2}, plan_batch_norm(**ONE_TILE)),
    "another function": ("plan_moments", {}, {"num_warps": 4}, LONG),
    "arguments that are missing": ("plan_batch_norm", {}, {"splits": 2}, NORM),
}


@pytest.mark.parametrize(("name", "given", "use", "of"), WRONG.values(), ids=list(WRONG))
def test_what_could_change_more_than_the_speed_is_refused(table, name, given, use, of):
    table(entry(name, given, use, of))
    with pytest.raises(ValueError, match=r"tuned\.json: H100"):
        plan_rows(**ROWS)


@pytest.mark.parametrize("text", ["", "[]", '{"H100": 3}', '{"H100": [3]}', '{"H100": [{"plan": "plan_rows"}]}'])
def test_what_is_no_table_is_refused(text):
    with pytest.raises(ValueError, match=r"tuned\.json"):
        tuned.read(text)
