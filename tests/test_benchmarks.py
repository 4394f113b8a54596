"""The harness of `python -m benchmarks`, and its command `cpu`: right results only, in turn, and what falls short is said."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from benchmarks import compare, cpu, every, harness, linalg, linear, overhead, plots
from benchmarks.__main__ import main
from benchmarks.cpu_cases import TINIES, Work
from benchmarks.harness import Aim, Bench, Results, Row, in_turn, peak_bytes
from benchmarks.progress import Progress
from benchmarks.rows import BF16
from benchmarks.rows import Row as Case

SMALL = [
    Work(Case("cross entropy", (8, 10), gradient="auto"), 2),
    Work(Case("cross entropy", (8, 10), BF16, soft=True, gradient="auto"), 3),
    Work(Case("softmax", (8, 10)), 5),
    Work(Case("batch norm", (8, 3, 4, 4)), 5),
    Work(Case("batch norm", (8, 3, 4, 4), channels_last=True, statistics="evaluation"), 2),
    Work(Case("batch norm", (8, 3, 4, 4), statistics="frozen"), 6),
]


def results(folder, **environment):
    return Results.new(folder, harness.COLUMNS, environment)


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.row.name)
def test_a_row_is_verified_before_it_is_timed(work):
    given, steps = cpu.steps_of(work, ("hw3gpu", "eager"))
    assert cpu.row_of(work, given, {}, steps).check() == ""
    ours = steps["hw3gpu"]
    wrongs = [dataclasses.replace(ours, forward=lambda: 1.05 * ours.forward())]
    if work.of != "forward":
        wrongs.append(dataclasses.replace(ours, upstream=1.05 * ours.upstream))
    for wrong in wrongs:
        assert "error" in cpu.row_of(work, given, {}, {**steps, "hw3gpu": wrong}).check()


def test_what_is_wrong_is_not_timed(tmp_path):
    said, called = [], []
    run = Bench(results(tmp_path), 2, said.append)
    row = Row("row", "operation", (2, 3), "float32", "forward", {"hw3gpu": lambda: called.append(1)}, lambda: "off by 1")
    assert run.measure(row) == {}
    assert (called, run.wrong, said) == ([], 1, ["wrong: row: off by 1"])
    (line,) = run.results.measurements
    assert (line["right"], line["note"]) == ("no", "wrong: off by 1")


def test_a_row_is_written_with_its_rates_and_its_aims(tmp_path, monkeypatch):
    taken = {"hw3gpu": [2.0, 4.0, 6.0], "eager": [4.0, 8.0, 12.0], "copy": [1.0, 2.0, 3.0]}
    monkeypatch.setattr(harness, "in_turn", lambda calls, turns, repeat, **how: taken)
    run = Bench(results(tmp_path, device="d"), 3)
    aims = [Aim("eager", 3.0), Aim("copy", 0.4)]
    row = Row("row", "operation", (2, 3), "float32", "forward", dict.fromkeys(taken, list), lambda: "", 8e9, aims=aims)
    run.measure(row, copy="copy")
    ours, eager, copy = run.results.measurements
    assert (ours["right"], ours["bytes"], ours["GB_s"], ours["share_of_copy"]) == ("yes", 8e9, 2.0, 0.5)
    assert (eager["speedup"], eager["speedup_low"], eager["called_us"]) == (2.0, 2.0, 8e6)
    assert (copy["GB_s"], ours["device"]) == (4.0, "d")
    (short,) = plots.notes(json.loads(run.results.file.read_text()))
    assert short == "short: row, forward: eager takes 2.00 (2.00…2.00) × hw3gpu, aim 3"


def test_a_peer_that_fails_is_a_note_and_hw3gpu_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("no C++ compiler")

    def task(**calls):
        row = Row("row", "operation", (2,), "float32", "forward", calls, lambda: "", aims=[Aim("compiled", 1)])
        return lambda run: run.measure(row)

    monkeypatch.setattr(cpu, "tasks", lambda: [("one", task(hw3gpu=list, compiled=fails)), ("two", task(hw3gpu=fails))])
    assert main(["cpu", "--turns", "2", "--output", str(tmp_path / "run")]) == 1
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    ours, compiled, failed = found["measurements"]
    assert ours["called_us"] > 0
    assert compiled["note"] == failed["note"] == "RuntimeError: no C++ compiler"
    assert (found["done"], failed["row"]) == (["one", "two"], "two")
    assert "failed: two: RuntimeError: no C++ compiler" in capsys.readouterr().out


def test_a_share_is_that_of_the_copy_of_the_nearest_size(tmp_path):
    run = Bench(results(tmp_path), 2)
    assert run.copy_rate(100) is None
    run.results.parts["copy_GB_s"] = {"50": {"median": 3.0}, "5000": {"median": 2.0}}
    assert (run.copy_rate(90), run.copy_rate(8000)) == (3e9, 2e9)


def test_contestants_take_turns_with_and_without_the_pool(monkeypatch):
    monkeypatch.setenv("HW3GPU_CPU_CACHE_MB", "7")
    calls = []

    def contestant(name):
        return lambda: calls.append((name, os.environ["HW3GPU_CPU_CACHE_MB"]))

    seconds = in_turn({name: contestant(name) for name in ("a", "a, pool off")}, turns=2, repeat=3, around=cpu.pool)
    assert calls == 3 * (4 * [("a", "7")] + 4 * [("a, pool off", "0")])
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "a, pool off": 2}
    assert os.environ["HW3GPU_CPU_CACHE_MB"] == "7"


@pytest.mark.skipif(peak_bytes(list) is None, reason="no /proc/self/clear_refs: the peak of memory is not measured here")
def test_a_peak_of_memory_is_what_a_call_holds():
    assert peak_bytes(lambda: bytearray(64 << 20)) == pytest.approx(64 << 20, rel=0.1)


def test_the_time_left_is_told_by_the_pace(monkeypatch):
    now = iter([0.0, 30.0, 30.0, 30.0]).__next__
    monkeypatch.setattr(time, "monotonic", now)
    progress = Progress()
    progress.tasks = 5
    assert progress.left == "?:?? left"
    progress.done = 2
    assert progress.left == "about 0:45 left"


@pytest.mark.parametrize("work", TINIES, ids=lambda work: work.row.name)
def test_the_layers_of_a_small_call_add_up(work):
    given, steps = cpu.steps_of(work, ("hw3gpu", "eager"))
    layers = cpu.layers(work, given, steps, turns=1)
    parts = ("an empty autograd function", "outputs and addresses", "kernels", "checks and choices")
    assert sum(layers[part] for part in parts) == pytest.approx(layers["all"])
    assert 0 < layers["kernels"] < layers["all"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: Triton's launcher is compiled over a driver of no device")
def test_the_layers_of_a_call_on_a_gpu_add_up(tmp_path):
    run = Bench(results(tmp_path), 2)
    overhead.measure("softmax", overhead.CASES["softmax"], run)
    for way in ("forward", "backward"):
        parts = dict(run.results.parts["layers_us"][f"softmax, {way}"])
        assert parts.pop("all") == pytest.approx(sum(parts.values()))
        assert run.results.parts["launches"][f"softmax, {way}"] == 1
        us = {m["contestant"]: m["called_us"] for m in run.results.measurements if m["pass"] == way}
        assert 0 < us["bare launches"] < us["launches"]
    assert all("speedup" not in line for line in run.results.measurements)  # a part is no peer


def test_linear_cross_entropy_is_verified_and_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "ROWS", 64)
    kept = {name: loss for name, loss in linear.contestants().items() if name in ("hw3gpu", "hw3gpu, a tenth", "eager")}
    monkeypatch.setattr(linear, "contestants", lambda: kept)
    run = Bench(results(tmp_path), 2)
    linear.measure(run, (64, 32, 50))
    assert [line["contestant"] for line in run.results.measurements] == list(kept)
    wrong = {**kept, "hw3gpu, a tenth": lambda *args: 1.05 * kept["hw3gpu"](*args)}
    monkeypatch.setattr(linear, "contestants", lambda: wrong)
    linear.measure(run, (64, 32, 50))
    assert run.results.measurements[-1]["note"].startswith("wrong: hw3gpu, a tenth: ")


def test_a_minimum_is_verified_and_timed(tmp_path, monkeypatch):
    case = linalg.Case(30, 3, (linalg.CERTIFICATE,))
    run = Bench(results(tmp_path), 2)
    linalg.measure(case, run)
    assert {line["contestant"] for line in run.results.measurements} == {
        "hw3gpu", "hw3gpu, not certified", "NumPy", "torch", "SciPy"
    }  # fmt: skip
    (aim,) = run.results.parts["aims"]
    assert (aim["of"], aim["over"], aim["least"]) == ("hw3gpu, not certified", "hw3gpu", 0.8)
    sigma = case.matrices()
    assert linalg.check(case, sigma) == ""
    right = linalg.minimize_trace
    monkeypatch.setattr(linalg, "minimize_trace", lambda x, k: dataclasses.replace(right(x, k), value=1.001))
    assert linalg.check(case, sigma).startswith("the value is off the answer sheet's by ")
    monkeypatch.setattr(linalg, "minimize_trace", lambda x, k: dataclasses.replace(right(x, k), certified=False))
    assert linalg.check(case, sigma) == "not certified"


def test_too_few_turns_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["cpu", "--turns", "1"])
    assert "--turns: expected at least 2, got 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- results that are kept
def two_tasks(monkeypatch, then=lambda run: None):
    """The command `cpu` with one small row, and a task after it."""
    work = Work(Case("batch norm", (8, 3, 4, 4), statistics="evaluation"), 2, 1)
    monkeypatch.setattr(cpu, "LARGE", 1)
    monkeypatch.setattr(cpu, "COPIES", (1 << 12, 1 << 14))
    row = (work.row.name, lambda run: cpu.measure_known(run, work))
    monkeypatch.setattr(cpu, "tasks", lambda: [("copy", cpu.measure_copies), row, ("then", then)])


def test_a_run_is_kept_and_compared_with_itself(monkeypatch, tmp_path, capsys):
    two_tasks(monkeypatch)
    folder = tmp_path / "results" / "one"
    assert main(["cpu", "--turns", "2", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "then done, about 0:00 left" in printed
    found = json.loads((folder / "results.json").read_text())
    assert found["done"] == ["copy", "batch norm 8x3x4x4 float32, evaluation", "then"]
    assert found["environment"]["command"] == "python -m benchmarks cpu --turns 2"
    ours, eager = found["measurements"]
    assert (ours["contestant"], eager["contestant"]) == ("hw3gpu", "eager")
    assert ours["bytes"] == 2 * 4 * 8 * 3 * 4 * 4
    assert ours["GB_s"] == pytest.approx(ours["bytes"] / ours["called_us"] / 1e3)
    assert ours["share_of_copy"] == pytest.approx(ours["GB_s"] / found["copy_GB_s"]["4096"]["median"])
    assert eager["speedup_low"] <= eager["speedup"] <= eager["speedup_high"]
    for line in (ours, eager):
        assert line["called_low_us"] <= line["called_us"] <= line["called_high_us"]
        assert {"device", "commit", "seed", "torch", "numpy", "command"} <= line.keys()
    header, *lines = (folder / "measurements.csv").read_text().splitlines()
    assert header.startswith("row,operation,shape,dtype,pass,contestant,graph_us")
    assert len(lines) == 2
    if importlib.util.find_spec("matplotlib"):
        for name in ("speedup", "bandwidth"):
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    assert main(["compare", str(folder), str(folder / "results.json")]) == 0
    assert "2 in both: B takes less in 0, more in 0" in capsys.readouterr().out
    assert main(["cpu", "--output", str(folder)]) == 2
    assert "expected a folder with no results" in capsys.readouterr().err


def test_only_the_rows_asked_for_are_measured(monkeypatch, tmp_path):
    two_tasks(monkeypatch)
    assert main(["cpu", "--turns", "2", "--output", str(tmp_path / "few"), "--only", "then"]) == 0
    assert json.loads((tmp_path / "few" / "results.json").read_text())["done"] == ["copy", "then"]


def test_an_interrupted_run_keeps_what_is_finished(monkeypatch, tmp_path, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    two_tasks(monkeypatch, interrupt)
    assert main(["cpu", "--turns", "2", "--output", str(tmp_path / "cut")]) == 130
    found = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert (len(found["measurements"]), found["running"]) == (2, "then")
    assert "not finished: then" in capsys.readouterr().out


def test_all_is_one_command_after_the_other(monkeypatch, tmp_path, capsys):
    """Each in its own folder, which `compare` reads together; a status that is not 0 is told, and Ctrl-C ends all."""
    begun, statuses = [], dict.fromkeys(every.ALL, 0) | {"linear": 1}

    class Process:
        def __init__(self, words, cwd):
            name, folder = words[3], words[words.index("--output") + 1]
            begun.append((name, words[words.index("--turns") + 1] if "--turns" in words else None))
            os.makedirs(folder)
            a_run(folder, row=(1, 2, 3))
            self.returncode = statuses[name]

        def wait(self):
            return self.returncode

    monkeypatch.setattr(every.subprocess, "Popen", Process)
    monkeypatch.setattr(every, "device_name", lambda pretend: None)
    assert main(["all", "--turns", "3", "--output", str(tmp_path / "all")]) == 1
    assert begun == [(name, None if name == "traffic" else "3") for name in every.ALL if name != "gpu"]
    assert "no gpu, for torch finds no CUDA device" in capsys.readouterr().out
    together = compare.spreads(compare.read(tmp_path / "all"))
    assert sorted(together) == sorted((f"{name}: row", "forward", "hw3gpu") for name, _ in begun)
    statuses["cpu"], begun[:] = 130, []
    assert main(["all", "--output", str(tmp_path / "cut")]) == 130
    assert [name for name, _ in begun] == ["cpu"]
    assert main(["all", "--output", str(tmp_path / "all")]) == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err


def a_run(folder, **microseconds):
    """Results with a row for each name: its low quartile, median and high quartile."""
    lines = [
        {"row": row, "pass": "forward", "contestant": "hw3gpu", "graph_us": None}
        | dict(zip(("called_low_us", "called_us", "called_high_us"), of, strict=True))
        for row, of in microseconds.items()
    ]
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"environment": {"device": folder.name}, "measurements": lines}))
    return str(folder)


def test_a_comparison_marks_what_does_not_overlap(tmp_path, capsys):
    before = a_run(tmp_path / "before", up=(9, 10, 11), down=(9, 10, 11), noise=(9, 10, 11), gone=(1, 1, 1))
    after = a_run(tmp_path / "after", up=(12, 20, 21), down=(4, 5, 8), noise=(11, 20, 21), new=(1, 1, 1))
    found, only_a, only_b = compare.pairs(*(compare.read(tmp_path / name) for name in ("before", "after")))
    assert [(pair.key[0], pair.ratio, pair.mark) for pair in found] == [
        ("up", 2.0, "more"), ("down", 0.5, "less"), ("noise", 2.0, "")
    ]  # fmt: skip
    assert (only_a, only_b) == ([("gone", "forward", "hw3gpu")], [("new", "forward", "hw3gpu")])
    assert main(["compare", before, after]) == 0
    printed = capsys.readouterr().out
    for text in ("device: A before, B after", "only in A: gone, forward, hw3gpu", "B takes less in 1, more in 1"):
        assert text in printed
    assert main(["compare", before, str(tmp_path / "nothing")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
