"""Evidence step 3: the heaviest options of each plan, compiled for parts that need not be there."""

from __future__ import annotations

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
    wrong = [
        f"{launch.name}: {complaint}" for launch in launches for complaint in evidence.findings(launch, arch, case.dtype)[1]
    ]
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
