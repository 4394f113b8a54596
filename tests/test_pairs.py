"""Every pair of options, dtypes, layouts, values and tools of a function, against the answer sheet (`drawn_cases.py`).

The faults of before all sat where two features met. `make test` runs the rows whose tool is not torch.compile, and one that is;
`--slow` all of them, and as many again by another choice of rows. In the interpreter a few rows run.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from drawn_cases import SUBJECTS
from drawn_values import Row
from pairs import covering

import hw3gpu

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*non-contiguous.*:UserWarning"),
]


def run(name: str, rows: list[Row]) -> None:
    """Runs all rows, and fails with those that failed."""
    assert rows
    wrong = []
    for row in rows:
        try:
            SUBJECTS[name].check(row)
        except Exception as error:
            wrong.append(f"{row}\n    {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of {len(rows)} rows:\n" + "\n".join(wrong)


def rows_of(name: str, seed: int = 0) -> list[Row]:
    return covering(SUBJECTS[name].factors, SUBJECTS[name].allowed, seed=seed)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_pair_of_levels(name: str, seed: int) -> None:
    run(name, [row for row in rows_of(name, seed) if row.get("tool") != "compile"])


COMPILED = [name for name in SUBJECTS if "tool" in SUBJECTS[name].factors]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("share", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_level_under_the_compiler(name: str, share: int) -> None:
    run(name, [row for row in rows_of(name) if row["tool"] == "compile"][:share])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name for name in SUBJECTS if name not in ("minimize_trace", "points_with_moments")])
@pytest.mark.parametrize("share", [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_some_rows_by_the_triton_kernels(device: str, name: str, share: int) -> None:
    rows = [row for row in rows_of(name) if row.get("tool") != "compile"]
    run(name, rows[:: max(len(rows) // share, 1)])


ROW = {"kind": "numpy", "dtype": "float32", "layout": "contiguous", "values": "normal", "shape": (2, 7), "axis": -1}


@pytest.mark.parametrize(
    ("message", "broken"),
    [
        ("of the bound", lambda z, y, calls: y * np.float32(1 + 1e-5)),
        ("an argument was changed", lambda z, y, calls: z.fill(0) or y),
        ("other bits on a second run", lambda z, y, calls: np.nextafter(y, np.float32(calls % 2))),
    ],
)
def test_a_wrong_function_is_found(monkeypatch: pytest.MonkeyPatch, message: str, broken: Any) -> None:
    right, calls = hw3gpu.softmax, itertools.count()
    SUBJECTS["softmax"].check(ROW)
    monkeypatch.setattr(hw3gpu, "softmax", lambda z, axis: broken(z, right(z, axis), next(calls)))
    with pytest.raises(AssertionError, match=message):
        SUBJECTS["softmax"].check(ROW)


def test_the_rows_hold_every_pair_that_is_allowed() -> None:
    factors = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (0, 1, 2, 3)}

    def allowed(row: Row) -> bool:
        return not (row.get("a") == 1 and row.get("b") == "x") and not (row.get("c") is True and row.get("d") == 3)

    rows = covering(factors, allowed)
    assert all(allowed(row) and list(row) == list(factors) for row in rows)
    missing: list[Any] = []
    for (f, fs), (g, gs) in itertools.combinations(factors.items(), 2):
        missing += [(f, i, g, j) for i in fs for j in gs if not any(row[f] == i and row[g] == j for row in rows)]
    assert missing == [("a", 1, "b", "x"), ("c", True, "d", 3)]
    assert len(rows) <= 16  # of 54; 12 at least


def test_a_pair_that_no_allowed_row_holds_is_no_row() -> None:
    rows = covering({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, lambda row: not (row.get("a") == 1 and "c" in row))
    assert {tuple(row.values()) for row in rows} == {(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)}
