"""`python -m benchmarks gpu` without a GPU: the whole command, pretended; what it does when things fail; and CUDA's rules."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cuda_clock, gpu, gpu_checks, gpu_tune, supervisor, time_model
from benchmarks.__main__ import main
from benchmarks.cuda_clock import Clock, Timed, Times
from benchmarks.gpu_rows import BF16, F16, ROWS, Row, contestants, inputs
from benchmarks.harness import Deadline, Results
from benchmarks.inside_triton import StandIn
from benchmarks.pretended import Cuda, RefusedError
from hw3gpu import _bound
from hw3gpu import functional as HF
from hw3gpu._cli.operations import Operation, Output
from hw3gpu.kernels.gpu import tuned
from hw3gpu.kernels.gpu.device import A100, H100, RTX_5090

ONLY = ("softmax 4096x1000 ", "256x64x64 ")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def nothing_is_collected(monkeypatch):
    """Of a process that has run a whole suite that takes a third of a second, and no device's memory is waited for here."""
    nothing = types.SimpleNamespace(collect=lambda: None, freeze=lambda: None)
    for module in (cuda_clock, gpu):
        monkeypatch.setattr(module, "gc", nothing)


def command(folder, *options, session=False):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks", "gpu", "--pretend", "--into", str(folder), *options]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
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


# ---------------------------------------------------------------------------------------------- CUDA's rules
@pytest.fixture
def clock():
    Cuda.recorded.clear()
    return Clock(Cuda, "meta", 50 << 20)


def test_the_cache_is_flushed_before_each_event_and_nothing_waits_between_two_calls(clock, monkeypatch):
    done = []
    monkeypatch.setattr(clock, "flush", lambda: done.append("flush"))
    monkeypatch.setattr(Cuda, "synchronize", classmethod(lambda cls: [done.append("wait"), _happen()]))
    pieces = {name: Timed(partial(done.append, name), partial(done.append, f"before {name}")) for name in "ab"}
    times = clock.in_turn(pieces, 0.0, fewest=2)
    a, b = (["before " + name, "flush", name] for name in "ab")
    b_a, a_b = [*b, *a, "wait"], [*a, *b, "wait"]
    assert done == b_a + a_b + b_a
    assert {name: len(turns) for name, turns in times.turns.items()} == {"a": 2, "b": 2}


def _happen():
    for event in Cuda.recorded:
        event.happened = True


def test_one_that_fails_in_its_turn_leaves_the_others(clock):
    def fails():
        raise torch.OutOfMemoryError("no memory left")

    times = clock.in_turn({"a": Timed(tuple), "b": Timed(fails)}, 0.0, fewest=3)
    assert times.failed == {"b": "OutOfMemoryError: no memory left"}
    assert list(times.turns) == ["a"]
    assert len(times.turns["a"]) == 3


class Recorded:
    """A step that says on which stream it ran, and whether inside which graph."""

    def __init__(self):
        self.calls = []

    def forward(self):
        self.calls.append(("forward", Cuda.current_stream(), Cuda.capturing))
        return "result"

    def backward(self, result, retain=False):
        assert retain == (Cuda.capturing is not None), "what is replayed reads what the forward pass has saved"
        self.calls.append(("backward", Cuda.current_stream(), Cuda.capturing))
        return ("gradient",)


def test_a_graph_is_captured_on_the_side_stream_that_warmed_up(clock):
    of = Recorded()
    passes = clock.captured(of)
    streams = {stream for _, stream, _ in of.calls}
    assert len(streams) == 1
    assert Cuda.default not in streams
    assert [graph is None for *_, graph in of.calls] == 6 * [True] + 2 * [False]
    (_, _, forward), (_, _, backward) = of.calls[-2:]
    assert (forward.replay, backward.replay) == (passes.forward.call, passes.backward.call)
    assert forward is not backward
    assert passes.held == ("result", ("gradient",))
    assert Cuda.current_stream() is Cuda.default


def test_a_backward_pass_is_timed_after_a_forward_pass_of_its_own(clock):
    """A second one of the same forward pass may be another computation: of a gradient that the first one has handed out."""
    of = Recorded()
    passes = clock.called(of)
    of.calls.clear()
    clock.in_turn({"a": passes.backward}, 0.0, fewest=2)
    clock.host(passes.backward, 1)
    assert [name for name, *_ in of.calls] == 13 * ["forward", "backward"]


def test_what_waits_for_the_device_is_not_captured(clock, monkeypatch):
    modes = []
    monkeypatch.setattr(Cuda, "set_sync_debug_mode", classmethod(lambda cls, mode: modes.append(mode)))
    of = Recorded()

    def forward():
        if modes and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return Recorded.forward(of)

    with pytest.raises(RuntimeError, match="no graph: a call waits for the device"):
        clock.captured(_replaced(of, forward))
    assert modes == ["error", "default"]
    assert all(graph is None for *_, graph in of.calls)


def test_a_capture_that_fails_leaves_the_stream_as_it_was(clock):
    of = Recorded()

    def forward():
        if Cuda.capturing is not None:
            Cuda.synchronize()
        return Recorded.forward(of)

    with pytest.raises(RefusedError):
        clock.captured(_replaced(of, forward))
    assert Cuda.current_stream() is Cuda.default


def _replaced(of, forward):
    of.forward = forward
    return of


def test_the_stand_in_refuses_what_cuda_refuses():
    start, end = Cuda.Event(enable_timing=True), Cuda.Event(enable_timing=True)
    start.record()
    end.record()
    with pytest.raises(RefusedError, match="has not happened"):
        start.elapsed_time(end)
    Cuda.synchronize()
    assert start.elapsed_time(end) >= 0
    with pytest.raises(RefusedError, match="default stream"), Cuda.graph(Cuda.CUDAGraph(), stream=Cuda.default):
        pass
    for forbidden in (Cuda.synchronize, Cuda.empty_cache, start.record, Cuda.CUDAGraph().replay):
        with pytest.raises(RefusedError), Cuda.graph(Cuda.CUDAGraph()):
            forbidden()
        assert Cuda.current is not Cuda.default
        Cuda.set_stream(Cuda.default)
    assert Cuda.capturing is None


def test_the_stand_in_has_no_names_of_its_own():
    """What the clock calls is there in torch.cuda, with these parameters."""
    for name, own in vars(Cuda).items():
        if isinstance(own, classmethod) and name != "refuse_while_capturing":
            taken, there = (set(inspect.signature(getattr(of, name)).parameters) for of in (Cuda, torch.cuda))
            assert taken - {"graph"} <= there
    for own in (Cuda.Event, Cuda.Stream, Cuda.CUDAGraph):
        methods = {name for name in vars(own) if not name.startswith("_")}
        assert methods <= set(dir(getattr(torch.cuda, own.__name__)))


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
                _bound.forget()
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


# ---------------------------------------------------------------------------------------------- crashes, hangs and Ctrl-C
ENDS = {
    "crash": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "time.sleep(60)",
    "hang that is interrupted": f"signal.signal(signal.SIGINT, lambda *_: sys.exit({supervisor.INTERRUPTED})); time.sleep(60)",
    "lost device": f"sys.exit({supervisor.GO_ON})",
}
MEASURES = """
import json, os, pathlib, signal, sys, time
file, after = pathlib.Path(sys.argv[1]) / "results.json", sys.argv[2]
def write(done, running):
    new = {"environment": {}, "measurements": [], "done": done, "running": running, "after": after}
    file.with_suffix(".new").write_text(json.dumps(new))
    os.replace(file.with_suffix(".new"), file)
"""


class Faked(supervisor.Watch):
    """Its processes are scripts; `ends` is what each does in its turn."""

    def __init__(self, folder, *ends, minutes=1.0):
        super().__init__(argparse.Namespace(minutes=minutes), folder)
        self.ends, self.afters = list(ends), []

    def start(self, after):
        self.afters.append(after)
        process = subprocess.Popen([sys.executable, "-c", MEASURES + self.ends.pop(0), str(self.folder), after])
        while process.poll() is None and supervisor.found(self.folder).get("after") != after:
            time.sleep(0.05)  # however long a busy machine takes to begin
        self.since = time.time()
        return process


@pytest.mark.parametrize("how", ENDS)
def test_after_a_row_that_ends_its_process_another_goes_on(tmp_path, monkeypatch, how):
    monkeypatch.setattr(supervisor, "STILL_SECONDS", 1.0)
    watch = Faked(tmp_path, f"write(['copy'], 'row'); {ENDS[how]}", "write(['copy', 'row', 'next'], None)")
    assert watch.run() == 0
    assert json.loads((tmp_path / "results.json").read_text())["done"] == ["copy", "row", "next"]
    assert watch.afters == ["not begun", {"crash": "status -11", "lost device": "status 75"}.get(how, "it hung for 1 s")]


def test_a_process_that_begins_nothing_is_not_started_again(tmp_path):
    watch = Faked(tmp_path, "sys.exit(3)")
    assert watch.run() == 3


def test_a_process_that_does_not_stop_in_its_time_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    ignoring = "signal.signal(signal.SIGINT, signal.SIG_IGN); write([], 'row'); time.sleep(60)"
    assert Faked(tmp_path, ignoring, minutes=0.01).run() == 0


def arguments(folder, **options):
    given = {"pretend": True, "tune": False, "only": [], "into": str(folder), "until": time.time() + 60, "after": "status -11"}
    return argparse.Namespace(**given | {"worker": True} | options)


@pytest.fixture
def faked_tasks(monkeypatch):
    """The tasks of `work`; each entry is what it does."""
    todo = {}
    monkeypatch.setattr(gpu, "tasks", lambda *args: list(todo.items()))
    return todo


def test_the_row_that_ended_a_process_is_given_up_and_what_was_done_stays(tmp_path, faked_tasks):
    left = Results.open(tmp_path, gpu.COLUMNS)
    left.begin("one")
    left.finish()
    left.begin("two")
    ran = []
    faked_tasks |= {name: lambda name=name: ran.append(name) for name in ("one", "two", "three")}
    assert gpu.run(arguments(tmp_path)) == 0
    results = Results.open(tmp_path, gpu.COLUMNS)
    assert ran == ["three"]
    assert results.done == ["one", "two", "three"]
    assert [(line["row"], line["note"]) for line in results.measurements] == [
        ("two", "given up: the process that measured this ended (status -11)")
    ]


def test_a_row_that_fails_is_a_note_and_a_device_that_is_lost_ends_the_process(tmp_path, faked_tasks, monkeypatch):
    def fails():
        raise ValueError("no such thing")

    def lost(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    faked_tasks |= {"one": fails, "two": lambda: monkeypatch.setattr(Clock, "clear", lost), "three": fails}
    assert gpu.run(arguments(tmp_path)) == supervisor.GO_ON
    results = Results.open(tmp_path, gpu.COLUMNS)
    assert (results.done, results.running) == (["one"], "two")
    assert [line["note"] for line in results.measurements] == ["ValueError: no such thing"]


@pytest.mark.parametrize(("blamed", "of"), [("compiled", gpu.EVERY_ROW), ("hw3gpu", "two")])
def test_a_contestant_that_ended_a_process_is_left_out_and_its_row_measured_again(tmp_path, faked_tasks, blamed, of):
    left = Results.open(tmp_path, gpu.COLUMNS)
    left.begin("two")
    left.mark(blamed)
    ran = []
    faked_tasks |= {name: lambda name=name: ran.append(name) for name in ("one", "two")}
    assert gpu.run(arguments(tmp_path)) == 0
    results = Results.open(tmp_path, gpu.COLUMNS)
    assert ran == ["one", "two"]
    assert results.parts["left_out"] == {of: [blamed]}
    assert results.parts["ended"] == [f"two, at {blamed}: status -11"]


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


def test_what_the_time_does_not_reach_is_named(tmp_path, faked_tasks):
    faked_tasks |= {"one": lambda: None}
    assert gpu.run(arguments(tmp_path, until=time.time())) == 0
    assert json.loads((tmp_path / "results.json").read_text())["not_reached"] == ["one"]


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
