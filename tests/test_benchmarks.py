"""What `python -m benchmarks cpu` measures: right results only, in turn, and what falls short is said."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil

import pytest
import torch

from benchmarks import compare, cpu, overhead
from benchmarks.__main__ import main
from benchmarks.cpu_cases import TINIES, Work

SMALL = [
    Work("cross_entropy", (8, 10), 2),
    Work("cross_entropy", (8, 10), 3, soft=True),
    Work("cross_entropy", (8, 10), 2, dtype=torch.bfloat16),
    Work("softmax", (8, 10), 5),
    Work("batch_norm", (8, 3, 4, 4), 5),
    Work("batch_norm", (8, 3, 4, 4), 8, channels_last=True),
    Work("batch_norm", (8, 3, 4, 4), 2, statistics="evaluation"),
    Work("batch_norm", (8, 3, 4, 4), 6, statistics="frozen"),
]


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_a_row_is_verified_before_it_is_timed(work):
    step = work.step()
    cpu.verify(work, step)
    wrongs = [lambda *args: step.ours(*args) * 1.02, lambda *args: step.ours(*args).detach() + 0 * step.ours(*args)]
    for wrong in wrongs[:1] if step.forward_alone else wrongs:
        with pytest.raises(AssertionError, match="has an error of"):
            cpu.verify(work, dataclasses.replace(step, ours=wrong))


def test_contestants_take_turns_with_and_without_the_pool(monkeypatch):
    monkeypatch.setenv("HW3GPU_CPU_CACHE_MB", "7")
    calls = []

    def contestant(name):
        return lambda: calls.append((name, os.environ["HW3GPU_CPU_CACHE_MB"]))

    seconds = cpu.in_turn({name: contestant(name) for name in ("a", "a, pool off")}, turns=2, calls=3)
    assert calls == 3 * (4 * [("a", "7")] + 4 * [("a, pool off", "0")])
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "a, pool off": 2}
    assert os.environ["HW3GPU_CPU_CACHE_MB"] == "7"


def test_what_falls_short_is_said():
    spread = cpu.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert str(spread) == "3.00 (2.00…4.00)"
    kept = [cpu.Ratio("row", "eager", spread, 3.0), cpu.Ratio("row", "copy", spread, 3.0, at_most=True)]
    short = [cpu.Ratio("row", "eager", spread, 3.1), cpu.Ratio("row", "copy", spread, 2.9, at_most=True)]
    result = cpu.Result({}, ratios=[*kept, *short, cpu.Ratio("row", "eager, pool off", spread)], first_calls={"softmax": 0.7})
    assert result.shortfalls() == [
        "row: 3.00 (2.00…4.00) × eager, promised 3.1",
        "row: 3.00 (2.00…4.00) × copy, promised 2.9",
        "first call of softmax: 0.70 s, promised 0.5 s",
    ]


@pytest.mark.parametrize("work", TINIES, ids=lambda work: work.name)
def test_the_layers_of_a_small_call_add_up(work):
    layers = cpu.layers(work, work.step(), turns=1)
    parts = ("an empty autograd function", "outputs and addresses", "kernels", "checks and choices")
    assert sum(layers[part] for part in parts) == pytest.approx(layers["all"])
    assert 0 < layers["kernels"] < layers["all"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: Triton's launcher is compiled over a driver of no device")
def test_the_layers_of_a_call_on_a_gpu_add_up():
    with overhead.on_a_gpu():
        found = overhead.measure(overhead.CASES["softmax"], turns=1)
    for way in ("forward", "backward"):
        parts = ("an empty autograd function", "launches", "checks and choices")
        assert sum(found[f"{way}, {part}"] for part in parts) == pytest.approx(found[f"{way}, all"])
        assert found[f"{way}, count"] == 1
        assert 0 < found[f"{way}, bare launches"] < found[f"{way}, launches"]


def test_too_few_turns_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["cpu", "--turns", "1"])
    assert "--turns: expected at least 2, got 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- results that are kept
def one_row(monkeypatch, **more):
    """The command with one small row alone, which needs no compiler."""
    cases = {"ROWS": (), "HALVES": (), "KNOWN": (Work("batch_norm", (8, 3, 4, 4), 2, statistics="evaluation"),), "TINIES": ()}
    for name, value in {**cases, "FIRST_CALLS": {}, **more}.items():
        monkeypatch.setattr(cpu, name, value)


def test_a_run_is_kept_and_compared_with_itself(monkeypatch, tmp_path, capsys):
    one_row(monkeypatch, LARGE=1)
    folder = tmp_path / "results" / "one"
    assert main(["cpu", "--turns", "2", "--output", str(folder)]) == 0
    found = json.loads((folder / "results.json").read_text())
    ours, eager = found["measurements"]
    assert (ours["contestant"], eager["contestant"]) == ("hw3gpu", "eager")
    assert ours["bytes"] == 2 * 4 * 8 * 3 * 4 * 4
    assert ours["GB_s"] == pytest.approx(ours["bytes"] / ours["called_us"] / 1e3)
    assert eager["speedup_low"] <= eager["speedup"] <= eager["speedup_high"]
    for line in (ours, eager):
        assert line["called_low_us"] <= line["called_us"] <= line["called_high_us"]
        assert {"device", "commit", "seed", "torch", "numpy"} <= line.keys()
    header, *lines = (folder / "measurements.csv").read_text().splitlines()
    assert header.startswith("row,operation,shape,dtype,pass,contestant,called_us")
    assert len(lines) == 2
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "speedup.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    assert main(["compare", str(folder), str(folder / "results.json")]) == 0
    assert "2 in both: B is faster in 0, slower in 0" in capsys.readouterr().out
    assert main(["cpu", "--output", str(folder)]) == 2
    assert "expected a folder with no results" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_is_finished(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    one_row(monkeypatch, LARGE=1, measure_tinies=interrupt)
    assert main(["cpu", "--turns", "2", "--output", str(tmp_path / "cut")]) == 130
    assert len(json.loads((tmp_path / "cut" / "results.json").read_text())["measurements"]) == 2


def a_run(folder, **microseconds):
    """Results with a row for each name: its low quartile, median and high quartile."""
    lines = [
        {"row": row, "pass": "forward", "contestant": "hw3gpu", "graph_us": None}
        | dict(zip(("called_low_us", "called_us", "called_high_us"), of, strict=True))
        for row, of in microseconds.items()
    ]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"environment": {"device": folder.name}, "measurements": lines}))
    return str(folder)


def test_a_comparison_marks_what_does_not_overlap(tmp_path, capsys):
    before = a_run(tmp_path / "before", up=(9, 10, 11), down=(9, 10, 11), noise=(9, 10, 11), gone=(1, 1, 1))
    after = a_run(tmp_path / "after", up=(12, 20, 21), down=(4, 5, 8), noise=(11, 20, 21), new=(1, 1, 1))
    found, only_a, only_b = compare.pairs(*(compare.read(tmp_path / name) for name in ("before", "after")))
    assert [(pair.key[0], pair.ratio, pair.mark) for pair in found] == [
        ("up", 2.0, "slower"), ("down", 0.5, "faster"), ("noise", 2.0, "")
    ]  # fmt: skip
    assert (only_a, only_b) == ([("gone", "forward", "hw3gpu")], [("new", "forward", "hw3gpu")])
    assert main(["compare", before, after]) == 0
    printed = capsys.readouterr().out
    for text in ("device: A before, B after", "only in A: gone, forward, hw3gpu", "B is faster in 1, slower in 1"):
        assert text in printed
    assert main(["compare", before, str(tmp_path / "nothing")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
