"""`python -m benchmarks gpu` without a GPU: the whole command, pretended; what it does when things fail; and CUDA's rules."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cuda_clock, gpu, gpu_checks, gpu_tune, time_model
from benchmarks.__main__ import main
from benchmarks.cuda_clock import Clock, Times
from benchmarks.evidence.compile_without_gpu import StandIn
from benchmarks.harness import Deadline, Results
from benchmarks.pretended import Cuda
from benchmarks.rows import BF16, F16, ROWS, Row, contestants, inputs
from hw3gpu import functional as HF
from hw3gpu._cli.operations import Operation, Output
from hw3gpu._torch import bound_launches
from hw3gpu.kernels.gpu import tuned
from hw3gpu.kernels.gpu.device import A100, H100, RTX_5090

ONLY = ("softmax 4096x1000 ", "256x64x64 ")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def nothing_is_collected(monkeypatch):
    """Of a process that has run a whole suite that takes a third of a second, and no device's memory is waited for here."""
    nothing = types.SimpleNamespace(**dict.fromkeys(("collect", "freeze", "disable", "enable"), lambda: None))
    for module in (cuda_clock, gpu):
        monkeypatch.setattr(module, "gc", nothing)


AS_FROM_A_TERMINAL = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


def command(folder, *options, session=False):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks", "gpu", "--pretend", "--output", str(folder), *options]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if session:  # with SIGINT as a terminal leaves it: a shell's background job, as pytest may be one, ignores it
        words = [sys.executable, "-c", AS_FROM_A_TERMINAL, *words]
    return subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=session, **out)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """(what was printed, the results, the folder) of the whole command for two small rows."""
    folder = tmp_path_factory.mktemp("pretended")
    process = command(folder, "--tune", "--minutes", "5", "--only", *ONLY)
    printed, _ = process.communicate(timeout=320)
    assert process.returncode == 0, printed
    return printed, json.loads((folder / "results.json").read_text()), folder


def test_the_whole_command_runs_pretended(pretended):
    _, results, folder = pretended
    small = [row.name for row in ROWS if any(text in row.name for text in ONLY)]
    assert results["done"] == ["copy", "correctness", *small, f"tune {small[0]}", "correctness, all of it"]
    assert results["running"] is None
    timed = {(line["row"], line["pass"], line["contestant"]) for line in results["measurements"] if line.get("graph_us")}
    for of in ("forward", "backward"):
        assert {name for row, p, name in timed if (row, p) == (small[0], of)} >= {"hw3gpu", "eager", "compiled"}
    assert len(list(csv.DictReader((folder / "measurements.csv").open()))) == len(results["measurements"])
    assert {file.name for file in folder.glob("*.png")} == {"bandwidth.png", "roofline.png", "speedup.png"}
    assert results["correctness"]["passed"]
    assert not results["correctness"]["failures"]


def test_every_output_says_that_it_was_pretended(pretended):
    printed, results, folder = pretended
    assert "pretended" in printed
    assert results["environment"]["pretended"] is True
    assert all(line["pretended"] for line in results["measurements"])
    assert all(line["pretended"] == "True" for line in csv.DictReader((folder / "measurements.csv").open()))


def test_a_peer_that_fails_is_a_note_of_its_row(pretended):
    _, results, _ = pretended
    notes = {(line["contestant"], line["note"]) for line in results["measurements"] if line["note"]}
    assert any(name == "CuPy eigh" for name, _ in notes)


# ---------------------------------------------------------------------------------------------- a row is verified
SMALL = [
    Row("batch norm", (8, 6, 9, 7)),
    Row("batch norm", (8, 6, 9, 7), BF16, channels_last=True),
    Row("batch norm", (8, 6, 9, 7), BF16, fused=True),
    Row("cross entropy", (30, 101)),
    Row("cross entropy", (300, 101), BF16, gradient="forward"),
    Row("cross entropy", (30, 101), BF16, soft=True),
    Row("softmax", (30, 101), F16),
    Row("linear cross entropy", (64, 32, 50)),
    Row("token log-probabilities", (32, 101), BF16),
    Row("distillation", (32, 101), kind="jensen_shannon"),
    Row("linear token log-probabilities", (64, 32, 50)),
    Row("linear distillation", (64, 32, 50), kind="forward"),
]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_a_row_is_held_to_the_answer_sheet(row):
    given = inputs(row, "cpu")
    made = contestants(row, given, lambda function: function)
    found = []
    for name in ("hw3gpu", "eager"):
        step = made[name]()
        result = step.forward()
        found.append((result, step.backward(result)))
    (result, gradients), eager = found
    assert gpu_checks.row_check(row, given, (result, gradients), eager) == ""
    assert "error" in gpu_checks.row_check(row, given, (1.05 * result, gradients), eager)
    for at in range(len(gradients)):
        wrong = tuple(1.05 * g if i == at else g for i, g in enumerate(gradients))
        assert "error" in gpu_checks.row_check(row, given, (result, wrong), eager)


@pytest.fixture
def on_the_host(monkeypatch):
    """A GPU whose tensors are the host's: results are there to be checked, and CUDA's rules are kept."""
    monkeypatch.setattr(Clock, "flush", lambda self: None)
    return gpu.Gpu(Cuda, "cpu", H100, Clock(Cuda, "cpu", 0), lambda function: function, False, copy_rate=1e9)


def measured(gpu_, row):
    lines = gpu.measure_row(gpu_, row, Deadline(time.time() + 2))
    assert len(lines) == len({(line["pass"], line["contestant"]) for line in lines})
    return {line["contestant"]: line for line in lines if line["pass"] == "backward"}


def test_a_row_is_verified_and_timed(on_the_host):
    lines = measured(on_the_host, Row("softmax", (8, 32)))
    ours = lines["hw3gpu"]
    assert (ours["right"], ours["note"]) == ("yes", "")
    assert ours["bytes"] == 3 * 8 * 32 * 4
    assert ours["GB_s"] == pytest.approx(ours["bytes"] / ours["graph_us"] / 1e3) == pytest.approx(ours["share_of_copy"])
    assert ours["speedup"] == 1.0
    assert lines["eager"]["speedup_low"] <= lines["eager"]["speedup"] <= lines["eager"]["speedup_high"]
    assert all(line["host_us"] > 0 and line["called_us"] > 0 for line in (ours, lines["eager"], lines["compiled"]))


def test_a_row_is_predicted_where_the_model_knows_the_device(on_the_host, monkeypatch):
    asked = []
    monkeypatch.setattr(time_model, "predicted", lambda *of: asked.append(of) or {"forward": 2.0, "backward": 4.0})
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 5090", "NVIDIA L40S"):
        on_the_host.device = dataclasses.replace(H100, name=name)
        ours = measured(on_the_host, Row("softmax", (8, 32)))["hw3gpu"]
    assert asked == [("softmax, call 8x32 float32", device) for device in (H100, A100, RTX_5090)]
    assert "predicted_us" not in ours
    on_the_host.device = H100
    ours = measured(on_the_host, Row("softmax", (8, 32)))["hw3gpu"]
    assert (ours["predicted_us"], ours["measured_over_predicted"]) == (4.0, ours["graph_us"] / 4.0)


def test_what_is_wrong_is_not_timed(on_the_host, monkeypatch):
    right = HF.softmax
    monkeypatch.setattr(HF, "softmax", lambda *args: 1.05 * right(*args))
    lines = measured(on_the_host, Row("softmax", (8, 32)))
    assert lines["hw3gpu"]["right"] == "no"
    assert lines["hw3gpu"]["note"].startswith("wrong: ")
    assert "graph_us" not in lines["hw3gpu"]
    assert lines["eager"]["graph_us"] > 0


def test_a_peer_without_memory_is_a_note(on_the_host, monkeypatch):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(torch.nn.functional, "softmax", fails)
    lines = measured(on_the_host, Row("softmax", (8, 32)))
    assert lines["eager"]["note"] == "out of memory"
    assert lines["hw3gpu"]["note"].startswith("not compared")
    assert lines["hw3gpu"]["graph_us"] > 0


def test_a_minimum_is_timed_without_a_graph(on_the_host):
    row = Row("minimize_trace", (4, 8, 8), torch.float64, k=2)
    lines = {line["contestant"]: line for line in gpu.measure_row(on_the_host, row, Deadline(time.time() + 2))}
    assert lines["hw3gpu"]["right"] == "yes"
    assert lines["torch eigh"]["speedup"] > 0
    assert all("graph_us" not in line for line in lines.values())


def test_a_minimum_is_held_to_torchs():
    row = Row("minimize_trace", (4, 16, 16), torch.float64, k=3)
    given = inputs(row, "cpu")
    assert gpu_checks.solver_check(row, given) == ""
    assert "off torch's" in gpu_checks.solver_check(dataclasses.replace(row, k=2), _Wrong(given.x, row.k))


class _Wrong:
    """Inputs whose matrix is another at the second look."""

    def __init__(self, x, k):
        self.looks = iter((x, x + torch.eye(16, dtype=x.dtype)))

    @property
    def x(self):
        return next(self.looks)


# ---------------------------------------------------------------------------------------------- every operation
def operations(monkeypatch, log, **found):
    """Operations that yield so many results each, right ones, or raise."""

    def run(name, outputs):
        def yields(place, dtype):
            for i in range(outputs):
                log.append(f"{name}{i}")
                yield Output(f"y{i}", np.ones(1, np.float32), np.ones(1), np.ones(1), 0.0)
            if not outputs:
                log.append(name)
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return Operation("S2", name, yields, dtypes=("float32",))

    monkeypatch.setattr(gpu_checks, "OPERATIONS", [run(name, outputs) for name, outputs in found.items()])


def test_operations_take_turns_until_the_time_is_over(monkeypatch):
    log = []
    operations(monkeypatch, log, a=2, b=3)
    found = gpu_checks.verify("cpu", Deadline(time.time() + 60), lambda name: None, lambda: None)
    assert log == ["a0", "b0", "a1", "b1", "b2"]
    assert (found.passed, found.failures, found.unfinished) == (5, [], [])
    late = Deadline(1.0, iter([0.0, 0.0, 0.0, 2.0, 2.0]).__next__)  # asked before each turn and before each output
    found = gpu_checks.verify("cpu", late, lambda name: None, lambda: None)
    assert (found.passed, found.unfinished) == (2, ["S2 a, torch, float32", "S2 b, torch, float32"])


def test_nothing_is_asked_of_a_device_that_was_lost(monkeypatch):
    log = []
    operations(monkeypatch, log, a=1, b=0, c=1)

    def lost():
        raise RuntimeError("CUDA error")

    found = gpu_checks.verify("cpu", Deadline(time.time() + 60), lambda name: None, lost)
    assert log == ["a0", "b"]
    assert [failure.rpartition(":")[0] for failure in found.failures][1] == "S2 b, torch, float32"
    assert "S2 c, torch, float32" in found.unfinished


# ---------------------------------------------------------------------------------------------- other plans
ROW = Row("softmax", (64, 1024))


def test_plans_that_are_tried_are_launched_and_later_ones_are_as_computed():
    with StandIn(90) as device:
        step = contestants(ROW, inputs(ROW, "meta"), lambda function: function)["hw3gpu"]()
        computed = step.forward() is not None and device.launches[-1].num_warps
        with gpu_tune.Trial() as trial:
            trial.watched(step)
            forward, backward = trial.asked.values()
            assert (forward.passes, backward.passes) == ({"forward"}, {"backward"})
            for use in list(forward.candidates("num_warps")):
                forward.use = use
                bound_launches.forget()
                step.forward()
                assert device.launches[-1].num_warps == use["num_warps"] != computed
        step.forward()
        assert device.launches[-1].num_warps == computed


@pytest.mark.parametrize("wrong", [torch.nan, 1.01, 0.0])
def test_a_plan_with_other_results_is_none(on_the_host, wrong):
    given = inputs(ROW, "cpu")
    step = contestants(ROW, given, lambda function: function)["hw3gpu"]()
    result = step.forward()
    expected = result, step.backward(result)
    gpu_tune.agree(on_the_host, step, expected)
    assert gpu_tune.right(on_the_host, ROW, given, step, step)
    off = dataclasses.replace(step, forward=lambda: wrong * step.forward())
    with pytest.raises(AssertionError, match="off results of up to"):
        gpu_tune.agree(on_the_host, off, expected)
    assert not gpu_tune.right(on_the_host, ROW, given, off, step)


@pytest.mark.parametrize(("share", "better"), [(0.5, True), (0.99, False)])
def test_the_best_plan_is_written_for_the_plans_to_read(tmp_path, monkeypatch, share, better):
    """Times of a clock for which fewer warps take `share` of the time."""

    def in_turn(self, calls, seconds, **options):
        warps = {name: json.loads(name).get("num_warps", 99) for name in calls}
        return Times({name: 5 * [share if n <= 8 else 1.0] for name, n in warps.items()})

    monkeypatch.setattr(gpu_tune, "FIELDS", {"plan_rows": {"num_warps": gpu_tune.FIELDS["plan_rows"]["num_warps"]}})
    results = Results(tmp_path, ())
    with gpu.opened(True) as pretended:
        monkeypatch.setattr(Clock, "in_turn", in_turn)
        gpu_tune.tune_row(pretended, ROW, results, Deadline(time.time() + 60))
    assert (tmp_path / "tuned.json").exists() is better
    if better:
        table = tuned.read((tmp_path / "tuned.json").read_text())
        assert {(device, name) for device, name, *_ in table} == {("pretended H100", "plan_rows")}
        assert all(plan.num_warps < of.num_warps for (*_, of), plan in table.items())
        assert len(results.parts["better_plans"]) == len(table) == 2


# ---------------------------------------------------------------------------------------------- what is left out, and Ctrl-C
def test_what_is_left_out_is_a_note(on_the_host):
    on_the_host.left_out = {gpu.EVERY_ROW: ["compiled"], "another row": ["hw3gpu"]}
    marks = []
    on_the_host.mark = marks.append
    lines = measured(on_the_host, Row("softmax", (8, 32)))
    assert lines["compiled"]["note"].startswith("left out")
    assert lines["hw3gpu"]["graph_us"] > 0
    assert set(marks) >= {"hw3gpu", "eager", ""}
    assert "compiled" not in marks
    assert marks[-1] == ""


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "torch finds no CUDA device; --pretend" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["gpu", "--pretend"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["gpu", "--minutes", "0"])
    assert "--minutes: expected a number above 0, got 0" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    process = command(tmp_path, "--minutes", "5", "--only", "entropy 32x10 ", "softmax 4096x1000 ", "56x56", session=True)
    for line in process.stdout:
        if "copy done" in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            break
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert "copy" in results["done"]
    assert results["copy_GB_s"]
    assert (tmp_path / "measurements.csv").exists()
