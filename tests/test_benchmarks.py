"""What `python -m benchmarks cpu` measures: right results only, in turn, and what falls short is said."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
import torch

from benchmarks import cpu, overhead
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
