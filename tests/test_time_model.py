"""Evidence step 3b: what is counted in machine code, what a device needs under way, and the time predicted from these."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from dataclasses import replace

import pytest

from benchmarks import call_cases, published, time_model, times
from benchmarks.evidence import in_flight, occupancy, sass
from benchmarks.evidence import run as evidence
from hw3gpu.kernels.gpu.device import A100, B200, H100, RTX_5090


# ---------------------------------------------------------------------------------------------- occupancy
@pytest.mark.parametrize(
    ("device", "arch", "registers", "warps", "shared", "programs"),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy": 128 threads and 320, 37 registers each
        (A100, 80, 37, 4, 0, 12),
        (A100, 80, 37, 10, 0, 4),
        (H100, 90, 32, 8, 0, 8),  # "each thread can use at most 32 registers" for full occupancy
        (H100, 90, 33, 8, 0, 6),
        (H100, 90, 255, 8, 0, 1),
        (H100, 90, 16, 1, 0, 32),  # programs that a multiprocessor holds at most
        (RTX_5090, 120, 16, 1, 0, 24),
        (RTX_5090, 120, 32, 8, 0, 6),  # 1536 threads
        (H100, 90, 32, 4, 100 << 10, 2),  # of 228 KB, and 1 KB more for each
        (H100, 90, 32, 4, 113 << 10, 2),
        (H100, 90, 32, 4, (113 << 10) + 1, 1),
    ],
)
def test_programs_of_a_multiprocessor(device, arch, registers, warps, shared, programs):
    assert occupancy.programs(device, arch, registers, warps, shared) == programs


def test_waves():
    assert occupancy.waves(H100, 132 * 4, 2) == (2.0, 1.0)
    assert occupancy.waves(H100, 132 * 3, 2) == (1.5, 0.5)
    assert occupancy.waves(H100, 66, 1) == (0.5, 0.5)


# ---------------------------------------------------------------------------------------------- machine code
def listing(*instructions):
    """What nvdisasm prints of (text, stall, sets, frees, waits for) each."""
    lines = []
    for address, x in zip(itertools.count(step=16), instructions):
        text, stall, sets, frees, waits = (*x, *(1, 7, 7, 0)[len(x) - 1 :])
        upper = (stall | sets << 5 | frees << 8 | waits << 11) << 41
        lines += [f"        /*{address:04x}*/                   {text} ;    /* 0x{0:016x} */", f"    /* 0x{upper:016x} */"]
    return "\n".join(lines)


def parts_of(*instructions):
    (code,) = sass.disassembled(listing(*instructions), [len(instructions)])
    return [part.as_dict() for part in sass.parts(code)]


def test_loads_are_under_way_until_the_first_is_needed():
    """Two loads of 16 bytes a thread, then one more: 1024 bytes, not 1536; the narrow one is not counted."""
    (part,) = parts_of(
        ("LDG.E.128 R4, [R2.64]", 1, 0),
        ("LDG.E.128 R8, [R2.64+0x10]", 1, 1),
        ("LDG.E R20, [R2.64+0x80]", 1, 2),
        ("FADD R4, R4, R8", 4, 7, 7, 0b11),
        ("LDG.E.128 R8, [R2.64+0x20]", 1, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 5),
        ("STG.E.128 [R2.64], R8", 1, 7, 7, 0b1),
        ("EXIT",),
        ("BRA 0x80",),
    )
    assert (part["loaded"], part["stored"], part["in_flight"], part["barriers"]) == (1536, 512, 1024, 1)
    assert (part["all"], part["fp32"], part["memory"]) == (8, 1, 5)
    assert "ahead" not in part
    assert part["cycles"] == 1 + 1 + 1 + 4 + 1 + 5 + sass.LATENCY["BAR"] + 1 + 1


def test_a_shuffle_is_waited_for():
    (part,) = parts_of(("SHFL.BFLY PT, R1, R0, 0x10, 0x1f", 1, 0), ("FADD R0, R0, R1", 2, 7, 7, 1), ("EXIT",))
    assert part["cycles"] == sass.LATENCY["SHFL"] + 2 + 1


def test_a_loop_and_what_it_asks_for_ahead():
    """Two tiles are copied ahead; each trip waits for the older of two and asks for one more."""
    copy = [("LDGSTS.E.BYPASS.128 [R1], [R2.64]", 1), ("LDGDEPBAR",)]
    loop = [("DEPBAR.LE SB0, 0x1",), *copy, ("@P0 BRA 0x40",)]
    before, body, after = parts_of(*copy, *copy, *loop, ("EXIT",))
    assert (before["loaded"], before["in_flight"], before["ahead"]) == (1024, 1024, 1024)
    assert (body["loop"], body["loaded"], body["in_flight"], body["ahead"]) == (True, 512, 1024, 1024)
    assert "loop" not in after


def test_a_loop_that_waits_in_the_trip_asks_for_nothing_ahead():
    loop = [("LDG.E.64 R4, [R2.64]", 1, 0), ("FADD R0, R0, R4", 4, 7, 7, 1), ("@P0 BRA 0x0",)]
    body, _ = parts_of(*loop, ("EXIT",))
    assert (body["loaded"], body["in_flight"], body.get("ahead", 0)) == (256, 256, 0)


def test_kernels_end_to_end_keep_their_loops():
    """A branch names an address from the first kernel's beginning."""
    straight = [("MOV R1, R2",), ("EXIT",)]
    loop = [("MOV R0, RZ",), ("LDG.E R4, [R2.64]", 1, 0), ("@P0 BRA P1, 0x30",), ("EXIT",)]
    first, second = sass.disassembled(listing(*straight, *loop), [2, 4])
    assert [x.text for x in first] == ["MOV R1, R2", "EXIT"]
    assert [x.target for x in second] == [None, None, 1, None]
    with pytest.raises(AssertionError, match="5 instructions, 6 were printed"):
        sass.disassembled(listing(*straight, *loop), [2, 3])


# ---------------------------------------------------------------------------------------------- enough in flight
def kernel(**changes):
    """A launch of 4096 programs of 4 warps that read a tile of 16 KB, and write it."""
    part = {
        "cycles": 500,
        "loaded": 4096,
        "stored": 4096,
        "in_flight": 4096,
        "all": 200,
        "fp32": 60,
        "alu": 60,
        "imad": 20,
        "memory": 20,
    }
    found = {"grid": 4096, "warps": 4, "shared": 0, "registers": 64, "read": 4096 << 14, "written": 4096 << 14, "parts": [part]}
    return found | {"programs": 8, "in_flight": 8 << 14} | changes


def found(**changes):
    return {"softmax 4096x4096x1 float32": {"90": {"_forward_kernel": kernel(**changes)}, "gfx942": {"_forward_kernel": {}}}}


def test_a_plan_that_is_too_thin_is_found(monkeypatch):
    monkeypatch.setattr(in_flight, "ALLOWED", {})
    assert in_flight.too_thin(found()) == []
    assert in_flight.too_thin(found(in_flight=32 << 10)) == []
    (complaint,) = in_flight.too_thin(found(in_flight=16 << 10))
    assert complaint.startswith("softmax 4096x4096x1 float32, _forward_kernel, 90: 16 KB under way")


def test_a_small_launch_needs_no_more_than_it_reads(monkeypatch):
    monkeypatch.setattr(in_flight, "ALLOWED", {})
    assert in_flight.too_thin(found(read=132 << 13, in_flight=8 << 10)) == []
    assert in_flight.too_thin(found(read=132 << 13, in_flight=2 << 10)) != []


def test_a_reason_holds_down_to_its_bytes_and_must_be_needed(monkeypatch):
    monkeypatch.setattr(in_flight, "ALLOWED", {"^softmax": (16, "for the test")})
    assert in_flight.too_thin(found(in_flight=16 << 10)) == in_flight.unneeded(found(in_flight=16 << 10)) == []
    assert in_flight.too_thin(found(in_flight=12 << 10)) != []
    assert in_flight.unneeded(found()) != []


# ---------------------------------------------------------------------------------------------- the time
def us(device=H100, **changes):
    return time_model.kernel_seconds(kernel(**changes), device) * 1e6


def of_part(**changes):
    return {"parts": [kernel()["parts"][0] | changes]}


def test_a_saturated_kernel_takes_its_bytes():
    nbytes = 2 * (4096 << 14)
    floor = nbytes / (time_model.REACHED * H100.bandwidth) * 1e6
    assert floor <= us() < 1.25 * floor


@pytest.mark.parametrize(
    "slower",
    [
        {"registers": 255},
        {"shared": 100 << 10},
        {"read": 4096 << 15},
        {"written": 4096 << 15},
        of_part(cycles=8000),
        of_part(all=4000),
        of_part(xu=600),
        of_part(in_flight=512),
    ],
    ids=str,
)
def test_less_under_way_and_more_to_do_take_longer(slower):
    assert us(**slower) > us()


def test_what_is_asked_for_ahead_comes_while_a_program_computes():
    """A program a multiprocessor, 64 KB a trip: computing and loading take turns, or the longer of the two."""
    loop = {"loop": True, "cycles": 6000, "loaded": 4096, "in_flight": 4096, "all": 100}
    launch = {"grid": 132, "warps": 16, "registers": 128, "read": 132 * 50 << 16, "written": 0}
    in_turn, ahead = (us(parts=[loop | more], **launch) for more in ({}, {"ahead": 4096}))
    assert ahead < 0.65 * in_turn


def test_faster_memory_takes_less_and_fewer_programs_more():
    assert us(B200) < us(H100) < us(A100)
    assert us(replace(H100, bandwidth=2 * H100.bandwidth)) < us()
    assert us(grid=33, read=33 << 14, written=33 << 14) > us() * 33 / 4096


def test_a_second_read_comes_from_the_cache_as_far_as_that_holds_it():
    again = [{"loop": True, "cycles": 100, "loaded": 512, "in_flight": 512, "all": 50}] * 2
    short, long = (
        {"grid": 132, "registers": 128, "written": 0, "parts": again, "read": 132 * row} for row in (64 << 10, 4 << 20)
    )
    assert us(**long) > 64 * us(**short) * 1.1


def test_launches_add_up_and_the_second_finds_what_the_first_read():
    first = kernel(read=16 << 20, written=0)
    once = time_model.seconds({"_a_kernel": first}, H100)
    twice = time_model.seconds({"_a_kernel": first, "_b_kernel": first}, H100)
    assert once + time_model.LAUNCH < twice < 2 * once


# ---------------------------------------------------------------------------------------------- published times
@pytest.fixture(scope="module")
def others():
    return published.others()


def test_published_times_of_others_kernels(others):
    """The error that docs/time_model.md states, and no more."""
    ratios = published.ratios(others)
    low, mean, high = published.spread([ratio for row, ratio in ratios.items() if row.compiled])
    assert (low > 0.65, 0.9 < mean < 1.1, high < 1.35) == (True, True, True)
    low, _, high = published.spread([ratio for row, ratio in ratios.items() if not row.compiled])
    assert (low > 0.65, high <= 1) == (True, True)


def test_the_code_of_others_is_what_others_json_says(others):
    """Liger's shortest kernel compiled again, where the versions are those of the file."""
    for name in ("liger-kernel", "triton"):
        if importlib.metadata.version(name) != others[name]:
            pytest.skip(f"others.json is of {name} {others[name]}")
    row = next(row for row in published.PUBLISHED if row.operation == "RMS norm" and row.compiled)
    assert evidence.examined(published.case(row), 90)[0] == others["kernels"][row.label]["90"]


# ---------------------------------------------------------------------------------------------- the sweep
@pytest.fixture(scope="module")
def kernels():
    """What `make evidence` found last; that it is of these sources is held by test_evidence."""
    return evidence.kernels_of(json.loads(evidence.FILE.read_text()))


def test_the_page_is_what_the_command_writes(kernels, others):
    text = times.PAGE.read_text()
    assert times.page_with(text, kernels, others) == text


def test_every_launch_of_the_sweep_keeps_enough_under_way():
    sweep = json.loads(evidence.FILE.read_text())
    kernels = evidence.kernels_of(sweep)
    assert in_flight.too_thin(kernels) == []
    if not any(evidence.waiting(operation, sweep) for operation in sweep):
        assert in_flight.unneeded(kernels) == []


def test_the_bytes_of_every_call_are_of_its_launches(kernels):
    """No kernel was renamed away from its bytes: launches read and write what the call has to, at least."""
    for call in call_cases.CALLS:
        for which, launches in time_model.passes(kernels.get(call.label, {}).get("90", {})).items():
            moved = sum(kernel.get("read", 0) + kernel.get("written", 0) for kernel in launches.values())
            assert moved >= call.least[which][0], (call.label, which)
