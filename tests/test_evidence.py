"""Evidence step 3: what `make evidence` found is of these sources, and some of it is compiled again."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import call_cases
from benchmarks.evidence import case as evidence_case
from benchmarks.evidence import cases as evidence_cases
from benchmarks.evidence import keys as evidence_keys
from benchmarks.evidence import run as evidence
from benchmarks.evidence.compile_without_gpu import StandIn, copies_ahead, machine_codes, one_front_end
from hw3gpu._torch import bound_launches
from hw3gpu.kernels.gpu import softmax
from hw3gpu.kernels.gpu._batch_norm.activation import ACT

HEAVY = {case.label: case for case in evidence_cases.cases() if case.heavy}
# Compiled in every run: every kind of kernel and every architecture, and the plans that leave a thread the fewest registers.
CONTROLS = (
    ("softmax 512x32771x1 float32", 90),
    ("softmax 512x16391x1 bfloat16", "gfx942"),
    ("cross entropy at once, hard, more 512x32771x1 float32", 100),
    ("cross entropy at once, soft, all 512x8195x1 float32", 80),
    ("cross entropy at once, hard, smoothing 512x50257x1 float32", 120),
    ("cross entropy in two steps, soft, all 4096x1001x1 bfloat16", 90),
    ("token log probs 512x50257x1 float32", 90),
    ("distillation forward 512x50257x1 float32", 90),
    ("batch norm training, fused 16x256x1024 float32", 90),
    ("batch norm training, fused 32x256x3136 float32", 80),
    ("batch norm training, fused 128x2048x49 bfloat16", 120),
    ("batch norm training, fused 32x64x3136 channels-last float32", 100),
    ("batch norm training, masked, residual, gelu 16x1024x512 float32", 90),
)


def examined(label, arch):
    """What the machine code of a case says by kernel, held to the part: no spills, no local memory, registers and shared memory
    that are there, no float64 instruction below float64."""
    found, wrong = evidence.examined(HEAVY[label], arch)
    assert found
    assert wrong == []
    return found


@pytest.mark.parametrize(("label", "arch"), CONTROLS, ids=str)
def test_machine_code(sweep, label, arch):
    """Nothing is wrong, and as Triton's version is the sweep's, the code is what the sweep says it is."""
    found, of = examined(label, arch), sweep[HEAVY[label].operation]
    if of["triton"] == triton.__version__ and of.get("schema") == evidence.SCHEMA:
        assert found == of["kernels"][label][str(arch)]


@pytest.mark.slow
@pytest.mark.parametrize("arch", evidence.ARCHITECTURES, ids=str)
@pytest.mark.parametrize("label", HEAVY)
def test_machine_code_of_every_heavy_case(label, arch):
    """By the compiler that is installed: where its version is not the sweep's, this stands for the sweep."""
    if (label, arch) not in CONTROLS:
        examined(label, arch)


def test_the_controls_are_of_every_kind():
    assert {HEAVY[label].operation for label, _ in CONTROLS} == {case.operation for case in HEAVY.values()}
    assert {arch for _, arch in CONTROLS} == {*evidence.ARCHITECTURES}


@pytest.mark.parametrize("V", [1000, 1001], ids=["rows on 16 bytes", "rows off 16 bytes"])
def test_accesses_are_16_bytes_wide(V):
    """The main tile moves in 128-bit accesses whatever the row's length; on 16 bytes nothing narrower than a number a row."""
    case = evidence_cases.Case("softmax", torch.bfloat16, False, evidence_cases._softmax_case((4096, V, 1), torch.bfloat16))
    for code in machine_codes(evidence.compiled(case, 90)):
        assert code.wide > 0
        if V % 8 == 0:
            assert code.narrow == 0


def test_kernels_read_at_once_are_as_read_one_by_one():
    (case,) = (case for case in evidence_cases.cases() if case.label == "softmax 4096x1001x1 float32")
    for arch in (arch for arch in evidence.ARCHITECTURES if isinstance(arch, int)):
        launches = evidence.compiled(case, arch)
        assert len(launches) > 1
        assert machine_codes(launches) == [machine_codes([launch])[0] for launch in launches]


def test_no_kernel_asks_which_gpu_it_is_compiled_for():
    """As `one_front_end` takes for granted."""
    for path in Path(softmax.__file__).parent.rglob("*.py"):
        assert not re.search(r"tl\.dot\w*\(|float8|tensor_descriptor|target_info", path.read_text()), path.name


def test_one_front_end_makes_the_same_machine_code(monkeypatch, tmp_path):
    """Each kernel goes through Triton's front end once, not once an architecture, and becomes the same binaries."""
    from triton.compiler.compiler import ASTSource

    (case,) = (case for case in evidence_cases.cases() if case.label == "softmax 4096x1001x1 float32")
    architectures = [arch for arch in evidence.ARCHITECTURES if isinstance(arch, int)]
    make_ir, made = ASTSource.make_ir, []
    monkeypatch.setattr(ASTSource, "make_ir", lambda *args: made.append(args[0].name) or make_ir(*args))

    def binaries(folder):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
        bound_launches.forget()
        for kernel in (softmax._forward_kernel, softmax._backward_kernel):
            monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.device_caches.default_factory))
        return [launch.binary for arch in architectures for launch in evidence.compiled(case, arch)]

    alone = binaries("alone")
    assert sorted(made) == sorted(["_forward_kernel", "_backward_kernel"] * len(architectures))
    made.clear()
    with one_front_end():
        assert binaries("shared") == alone
    assert sorted(made) == ["_backward_kernel", "_forward_kernel"]


def test_a_spill_would_be_seen():
    """The check is alive: a tile far beyond what a plan takes spills, and `findings` says so."""
    from hw3gpu.kernels.gpu import row_plan

    def run() -> None:
        z = torch.empty(16, 65536, 1, dtype=torch.float32, device="meta")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(softmax, "plan_rows", lambda *a, **k: row_plan.RowPlan(1, 65536, 65536, True, 32))
            softmax.forward(z, torch.empty_like(z))

    case = evidence_cases.Case("softmax", torch.float32, True, run)
    (launch,) = evidence.compiled(case, 90)
    assert any("spills" in complaint for complaint in evidence.findings(launch, 90, torch.float32)[1])


@pytest.fixture(scope="module")
def sweep():
    """What `make evidence` found last."""
    return json.loads(evidence.FILE.read_text())


@pytest.mark.parametrize("operation", evidence_case.OPERATIONS)
def test_the_sweep_is_of_these_kernels_and_launches(sweep, operation):
    """By hashes, 5 s for all operations: `benchmarks/evidence/keys.py`."""
    kept, keys = sweep[operation]["keys"], evidence.keys_of(operation)
    assert kept.keys() == sweep[operation]["kernels"].keys()
    assert {label for label, of in kept.items() if keys.get(label) != of} == set(), "run `make evidence`"


def test_calls_made_before_do_not_change_a_key():
    case = next(call_cases.cases())
    before = evidence_keys.key(case, (90,), evidence.SCHEMA)
    with StandIn(90) as device:
        case.run()
    assert evidence_keys.key(case, (90,), evidence.SCHEMA) == before
    assert len(evidence_keys.asked_for(case, 90)) == len(device.launches) > 0


@pytest.mark.parametrize("operation", evidence_case.OPERATIONS)
def test_no_case_waits(sweep, operation):
    waiting = evidence.waiting(operation, sweep)
    if waiting:
        pytest.skip(f"{len(waiting)} of {len(evidence.keys_of(operation))} cases wait for `make evidence`")


@triton.jit
def _another_base(m):
    return m


def test_prose_is_not_in_a_key():
    """Docstrings, comments and line breaks may change; each word of code counts."""
    bare = "@jit\ndef f(x, y):\n    if x:\n        y = 'a'\n    return g(x, y)\n"
    told = (
        '@jit\ndef f(x, y):  # why\n    """What it does.\n\n    More."""\n    # a line\n'
        "    if x:\n\n        y = 'a'\n    return g(\n        x, y)\n"
    )
    assert evidence_keys.code_of(told) == evidence_keys.code_of(bare)
    others = [bare.replace("y)\n", "x)\n"), bare.replace("'a'", "'b'"), bare.replace("    return", "        return"), bare[1:]]
    assert len({evidence_keys.code_of(text) for text in (bare, *others)}) == 5


def test_what_a_key_tells_apart(monkeypatch):
    """Another plan, another grid, a helper of other text, other bytes: and nothing else does."""

    def key_of(rows=64, **moves):
        run = evidence_cases._softmax_case((rows, 1000, 1), torch.float32)
        evidence_keys.text_hash.cache_clear()
        return evidence_keys.key(evidence_case.Case("softmax", torch.float32, False, run, moves), (80, 90), evidence.SCHEMA)

    plan_rows, keys = (
        softmax.plan_rows,
        {"as it is": key_of(), "rows": key_of(rows=65), "bytes": key_of(_forward_kernel=(1, 1))},
    )
    with monkeypatch.context() as patch:
        patch.setattr(softmax, "plan_rows", lambda *a, **k: dataclasses.replace(plan_rows(*a, **k), num_warps=2))
        keys["warps"] = key_of()
    with monkeypatch.context() as patch:
        patch.setattr(softmax, "finite_base", _another_base)
        keys["a helper"] = key_of()
    assert len({*keys.values()}) == len(keys)
    assert key_of() == keys["as it is"]


def test_the_sweep_found_nothing_wrong(sweep):
    assert [complaint for operation in sweep.values() for complaint in operation["complaints"]] == []


@pytest.mark.parametrize("activation", [name for name, number in ACT.items() if number])
def test_every_activation_is_compiled_in_every_kernel(sweep, activation):
    cases = [of["90"] for label, of in sweep["batch_norm"]["kernels"].items() if f", {activation} " in label]
    kernels = "forward", "normalize", "backward", "backward_reduce", "backward_apply"
    assert {*chain(*cases)} >= {f"_{name}_kernel" for name in kernels}


@pytest.mark.parametrize("operation", ["softmax", "cross_entropy"])
def test_long_rows_of_any_length_move_16_bytes_at_a_time(sweep, operation):
    """V from 1000 to 65536, on 16 bytes or off them, but not with a stride between their numbers."""
    rows = {label: of for label, of in sweep[operation]["kernels"].items() if re.search(r"(?<!strided) \d+x\d{4,}x1 ", label)}
    assert len(rows) > 20
    # what a loop copies ahead into shared memory is not counted in `wide`: the next test
    narrow = {
        (label, name) for label, of in rows.items() for name, code in of["90"].items()
        if not code["wide"] and not ("in two steps" in label and name == "_forward_kernel" and code["shared"] >= 8192)
    }  # fmt: skip
    assert narrow == set()


@pytest.mark.parametrize("loss", ["hard", "soft"])
def test_what_is_copied_ahead_is_16_bytes_at_a_time(loss):
    label = f"cross entropy in two steps, {loss} 512x50257x1 float32"
    (case,) = (case for case in evidence_cases.cases() if case.label == label)
    (forward,) = [launch for launch in evidence.compiled(case, 90) if launch.name == "_forward_kernel"]
    kinds = copies_ahead(forward)
    assert kinds
    assert all(kind.endswith(".128") for kind in kinds)


def test_the_table_of_the_page_is_the_sweeps(sweep):
    text = evidence.PAGE.read_text()
    assert evidence.page_with(text, evidence.kernels_of(sweep)) == text
