"""`python -m benchmarks gpu` without a GPU: the whole command, pretended; what it does when things fail; and CUDA's rules."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks
from benchmarks.gpu_rows import BF16, F16, ROWS, Row, contestants, inputs

ONLY = ("entropy 32x10 ", "softmax 4096x1000 ", "256x64x64 ")
ROOT = Path(__file__).resolve().parent.parent


def command(folder, *options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks", "gpu", "--pretend", "--into", str(folder), *options]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """(what was printed, the results, the folder) of the whole command for two small rows."""
    folder = tmp_path_factory.mktemp("pretended")
    process = command(folder, "--minutes", "1", "--only", *ONLY)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return printed, json.loads((folder / "results.json").read_text()), folder


def test_the_whole_command_runs_pretended(pretended):
    _, results, folder = pretended
    small = [row.name for row in ROWS if any(text in row.name for text in ONLY)]
    assert results["done"] == ["copy", "correctness", *small]
    assert results["running"] is None
    timed = {(line["row"], line["pass"], line["contestant"]) for line in results["measurements"] if line.get("graph_us")}
    for row in small[:2]:
        for of in ("forward", "backward"):
            assert {name for r, p, name in timed if (r, p) == (row, of)} >= {"hw3gpu", "eager", "compiled"}
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
    assert any(name == "Liger" for name, _ in notes)  # it asks for a value, which a pretended tensor has not


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
