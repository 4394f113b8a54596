"""How `benchmarks.cuda_clock` times on CUDA, under the rules of a stand-in for `torch.cuda`; and the stand-in."""

from __future__ import annotations

import inspect
import types
from functools import partial

import pytest
import torch

from benchmarks import cuda_clock
from benchmarks.cuda_clock import Clock, Timed
from benchmarks.pretended import Cuda, RefusedError


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(cuda_clock, "gc", types.SimpleNamespace(collect=lambda: None))  # of a whole suite's process
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
