"""What `python -m benchmarks gpu` does when the process that measures crashes, hangs or does not stop; and the next one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import types

import pytest

from benchmarks import cuda_clock, gpu, supervisor
from benchmarks.cuda_clock import Clock
from benchmarks.harness import COLUMNS, INTERRUPTED, Results


@pytest.fixture(autouse=True)
def nothing_is_collected(monkeypatch):
    """Of a process that has run a whole suite that takes a third of a second, and no device's memory is waited for here."""
    nothing = types.SimpleNamespace(**dict.fromkeys(("collect", "freeze", "disable", "enable"), lambda: None))
    for module in (cuda_clock, gpu):
        monkeypatch.setattr(module, "gc", nothing)


ENDS = {
    "crash": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "time.sleep(60)",
    "hang that is interrupted": f"signal.signal(signal.SIGINT, lambda *_: sys.exit({INTERRUPTED})); time.sleep(60)",
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
    given = {
        "pretend": True,
        "tune": False,
        "only": [],
        "output": str(folder),
        "until": time.time() + 60,
        "after": "status -11",
    }
    return argparse.Namespace(**given | {"worker": True} | options)


@pytest.fixture
def faked_tasks(monkeypatch):
    """The tasks of `work`; each entry is what it does."""
    todo = {}
    monkeypatch.setattr(gpu, "tasks", lambda *args: list(todo.items()))
    return todo


def test_the_row_that_ended_a_process_is_given_up_and_what_was_done_stays(tmp_path, faked_tasks):
    left = Results.open(tmp_path, COLUMNS)
    left.begin("one")
    left.finish()
    left.begin("two")
    ran = []
    faked_tasks |= {name: lambda name=name: ran.append(name) for name in ("one", "two", "three")}
    assert gpu.run(arguments(tmp_path)) == 0
    results = Results.open(tmp_path, COLUMNS)
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

    faked_tasks |= {"one": fails, "two": lambda: monkeypatch.setattr(Clock, "free", lost), "three": fails}
    assert gpu.run(arguments(tmp_path)) == supervisor.GO_ON
    results = Results.open(tmp_path, COLUMNS)
    assert (results.done, results.running) == (["one"], "two")
    assert [line["note"] for line in results.measurements] == ["ValueError: no such thing"]


@pytest.mark.parametrize(("blamed", "of"), [("compiled", gpu.EVERY_ROW), ("hw3gpu", "two")])
def test_a_contestant_that_ended_a_process_is_left_out_and_its_row_measured_again(tmp_path, faked_tasks, blamed, of):
    left = Results.open(tmp_path, COLUMNS)
    left.begin("two")
    left.mark(blamed)
    ran = []
    faked_tasks |= {name: lambda name=name: ran.append(name) for name in ("one", "two")}
    assert gpu.run(arguments(tmp_path)) == 0
    results = Results.open(tmp_path, COLUMNS)
    assert ran == ["one", "two"]
    assert results.parts["left_out"] == {of: [blamed]}
    assert results.parts["ended"] == [f"two, at {blamed}: status -11"]


def test_what_the_time_does_not_reach_is_named(tmp_path, faked_tasks):
    faked_tasks |= {"one": lambda: None}
    assert gpu.run(arguments(tmp_path, until=time.time())) == 0
    assert json.loads((tmp_path / "results.json").read_text())["not_reached"] == ["one"]
