"""README.md: every line of its Python is run, and each comment there holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hw3gpu import _error_bounds
from hw3gpu._core.dispatch import requested_backend
from measure import close

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
Names = dict[str, Any]


def fields(name: str, *fields: str) -> Callable[[Names, Any], None]:
    def check(names: Names, _: Any) -> None:
        for field in fields:
            assert np.isfinite(getattr(names[name], field)).all()

    return check


def four_axes(names: Names, _: Any) -> None:
    assert names["x"].shape == (8, 16, 16, 3)


def three_points(names: Names, _: Any) -> None:
    assert names["points"].shape == (3, 3)
    assert np.linalg.matrix_rank(np.diag([2.0, 1.0, 0.0])) + 1 == 3


def the_covariance_asked_for(names: Names, printed: Any) -> None:
    sigma = np.diag([2.0, 1.0, 0.0])
    bound = _error_bounds.points_with_moments(np.zeros(3), sigma, names["points"], dtype="float64")
    close(printed, sigma, None, "float64", bound.covariance)


def the_minimum_is_certified(names: Names, printed: Any) -> None:
    assert printed == 3.0
    assert names["hw3gpu"].minimize_trace(np.diag([3.0, 1.0, 2.0]), k=2).certified


# what each comment claims: of the names after its line, and of what the line printed
CLAIMS: dict[str, Callable[[Names, Any], None]] = {
    "(B, W, H, C)": four_axes,
    "norm.y, norm.mean, norm.var, norm.rstd": fields("norm", "y", "mean", "var", "rstd"),
    "step.loss, step.dz": fields("step", "loss", "dz"),
    "3 points: rank + 1": three_points,
    "diag(2, 1, 0), up to the rounding of float64": the_covariance_asked_for,
    "3.0, certified": the_minimum_is_certified,
}


def test_every_line_runs_and_every_comment_holds() -> None:
    printed: list[Any] = []
    names: Names = {"print": printed.append}
    claims = dict(CLAIMS)
    for line in "".join(BLOCKS).splitlines():
        code, _, comment = line.partition("  # ")
        printed[:] = [None]
        exec(code, names)
        if comment:
            claims.pop(comment)(names, printed[-1])
        if "conv2d_output_shape" in code:
            assert printed[-1] == (8, 8, 16, 32)
    assert not claims, f"no line has the comment {list(claims)}"
    assert type(names["model"][1]) is names["hw3gpu"].nn.BatchNorm2d
    names["criterion"](names["model"](torch.randn(2, 1, 4, 4)).flatten(1), torch.tensor([0, 1])).backward()


def test_the_choice_of_kernels_that_it_shows() -> None:
    (line,) = re.findall(r"`(with hw3gpu\.use_backend\(.*?:)`", README)
    found: list[str] = []
    exec(
        f"import hw3gpu\n{line}\n    found.append(requested_backend())",
        {"found": found, "requested_backend": requested_backend},
    )
    assert found == ["cpu"]
