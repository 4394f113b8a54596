"""Evidence step 3: the heaviest options of each plan, compiled for parts that need not be there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import evidence, evidence_cases
from benchmarks.inside_triton import machine_code

HEAVY = [case for case in evidence_cases.cases() if case.heavy]


@pytest.mark.parametrize("arch", evidence.ARCHITECTURES, ids=str)
@pytest.mark.parametrize("case", HEAVY, ids=lambda case: case.label)
def test_machine_code(case, arch):
    """No spills, no local memory, registers and shared memory within the part's, no float64 below float64."""
    launches = evidence.compiled(case, arch)
    assert launches
    wrong = [(launch.name, complaint) for launch in launches for complaint in evidence.findings(launch, arch, case.dtype)[1]]
    assert wrong == []


@pytest.mark.parametrize("V", [1000, 1001], ids=["rows on 16 bytes", "rows off 16 bytes"])
def test_accesses_are_16_bytes_wide(V):
    """The main tile moves in 128-bit accesses whatever the row's length; on 16 bytes nothing narrower than a number a row."""
    case = evidence_cases.Case("softmax", torch.bfloat16, False, evidence_cases._softmax_case((4096, V, 1), torch.bfloat16))
    for launch in evidence.compiled(case, 90):
        code = machine_code(launch.binary)
        assert code.wide > 0
        if V % 8 == 0:
            assert code.narrow == 0


def test_a_spill_would_be_seen():
    """The check is alive: a tile far beyond what a plan takes spills, and `findings` says so."""
    from hw3gpu.kernels.gpu import plan, softmax

    def run() -> None:
        z = torch.empty(16, 65536, 1, dtype=torch.float32, device="meta")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(softmax, "plan_rows", lambda *a, **k: plan.RowPlan(1, 65536, 65536, True, 32))
            softmax.forward(z, torch.empty_like(z))

    case = evidence_cases.Case("softmax", torch.float32, True, run)
    (launch,) = evidence.compiled(case, 90)
    assert any("spills" in complaint for complaint in evidence.findings(launch, 90, torch.float32)[1])


@pytest.fixture(scope="module")
def sweep():
    """What `make evidence` found last."""
    return json.loads(evidence.FILE.read_text())


@pytest.mark.parametrize("room", evidence_cases.ROOMS)
def test_the_sweep_is_of_these_sources(sweep, room):
    labels = evidence.labels_of_rooms()[room]
    assert not evidence.stale(room, labels, sweep), "evidence.json is of other sources: run `make evidence`"


def test_a_change_of_any_source_is_noticed(monkeypatch, tmp_path):
    """`_tile` is imported by all but moments, `plan` by each of them."""
    rooms = evidence_cases.ROOMS
    for path in Path(evidence.batch_norm.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(evidence.batch_norm, "__file__", str(tmp_path / "batch_norm.py"))
    before = {room: evidence.source_hash(room) for room in rooms}
    for changed, of in (("_tile", {*rooms} - {"moments"}), ("plan", {*rooms}), ("_mask", {"batch_norm"})):
        source = tmp_path / f"{changed}.py"
        text = source.read_text()
        source.write_text(text + "\n")
        assert {room for room in rooms if evidence.source_hash(room) != before[room]} == of
        source.write_text(text)


def test_the_sweep_found_nothing_wrong(sweep):
    assert [complaint for room in sweep.values() for complaint in room["complaints"]] == []


@pytest.mark.parametrize("room", ["softmax", "cross_entropy"])
def test_long_rows_of_any_length_move_16_bytes_at_a_time(sweep, room):
    """V from 1000 to 65536, on 16 bytes or off them, but not with a stride between their numbers."""
    rows = {label: of for label, of in sweep[room]["kernels"].items() if re.search(r"(?<!strided) \d+x\d{4,}x1 ", label)}
    assert len(rows) > 20
    narrow = [(label, name) for label, of in rows.items() for name, code in of["90"].items() if not code["wide"]]
    assert narrow == []


def test_the_table_of_the_readme_is_the_sweeps(sweep):
    text = evidence.README.read_text()
    assert evidence.readme_with(text, evidence.kernels_of(sweep)) == text
