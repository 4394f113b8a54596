"""Batch normalisation over a table of argument combinations drawn by hypothesis, the same in every run, beside PyTorch's own.

Values, running statistics and gradients are held to PyTorch's in float64 on the same numbers; where PyTorch refuses a
combination as it was given, so do we, with an exception of the same type.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from twins import layout_of

import hw3gpu.functional as HF
from hw3gpu._core.dispatch import requested_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

COMBINATIONS = {"cpu": 1000, "gpu": 40}  # the interpreter is slow
PARTS = 4  # so that pytest-xdist can divide them; each spoils its arguments in other ways
LAYOUTS = ["contiguous", "channels-last", "sliced", "expanded"]
SPOILT = [
    "integers", "one axis", "wrong weight", "wrong bias", "wrong running", "weight of another dtype", "one of two running",
    "no running in evaluation", "running with gradient", "eps 0 in training", "eps below 0", "eps of no kind",
    "momentum of no kind", "training of no kind", "one value", "a list",
]  # fmt: skip


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    single: bool  # parameters in the accumulation dtype
    training: bool
    tracked: bool
    weight: bool
    bias: bool
    eps: float
    momentum: float
    layouts: tuple[str, str]
    needs: tuple[bool, bool, bool]
    offset: float
    spoilt: str | None


@st.composite
def cases(draw: Any, spoilt: list[str]) -> Case:
    training = draw(st.booleans())
    shape = (
        draw(st.sampled_from([0, 1, 2, 3, 5])),
        draw(st.sampled_from([1, 2, 3, 4])),
        *draw(st.sampled_from([(), (1,), (3,), (2, 3), (1, 1), (4, 4), (1, 2, 2)])),
    )
    if training and shape[0] * math.prod(shape[2:]) == 1:
        shape = (2, *shape[1:])
    return Case(
        shape,
        draw(st.sampled_from(["float64", "float32", "float16", "bfloat16"])),
        draw(st.booleans()),
        training,
        draw(st.booleans()) or not training,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])),
        (draw(st.sampled_from(LAYOUTS[:3])), draw(st.sampled_from(LAYOUTS))),
        tuple(draw(st.booleans()) for _ in range(3)),
        draw(st.sampled_from([0.0, 5.0])),
        draw(st.sampled_from([None, *spoilt])),
    )


class Operands(NamedTuple):
    x: torch.Tensor
    running: list[torch.Tensor | None]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor


def operands(case: Case, device: str) -> Operands:
    rng = np.random.default_rng(abs(hash(case.shape)) % 1000)
    C, dtype = case.shape[1], getattr(torch, case.dtype)
    of_vectors = torch.promote_types(dtype, torch.float32) if case.single else dtype

    def vector(values: np.ndarray, wanted: bool) -> torch.Tensor | None:
        return torch.tensor(values, device=device).to(of_vectors) if wanted else None

    x = torch.tensor(case.offset + rng.standard_normal(case.shape), device=device).to(dtype)
    dy = torch.tensor(rng.standard_normal(case.shape), device=device).to(dtype)
    if case.layouts[1] == "expanded":
        dy = torch.ones((), dtype=dtype, device=device).expand(case.shape)
    return Operands(
        layout_of(x, case.layouts[0]),
        [vector(v, case.tracked) for v in (rng.standard_normal(C), rng.random(C) + 0.5)],
        vector(rng.standard_normal(C), case.weight),
        vector(rng.standard_normal(C), case.bias),
        layout_of(dy, case.layouts[1]),
    )


def run(function: Any, case: Case, given: Operands, double: bool = False) -> dict[str, torch.Tensor | None]:
    """Every result of a call and its backward pass, on copies."""
    x, running, weight, bias, dy = given
    copies = [None if v is None else (v.double() if double else v.clone()) for v in (x, weight, bias, *running)]
    asked = [v is not None and need for v, need in zip(copies[:3], case.needs, strict=True)]
    leaves = [None if v is None else v.requires_grad_(ask) for v, ask in zip(copies[:3], asked, strict=True)]
    y = function(leaves[0], *copies[3:], leaves[1], leaves[2], case.training, case.momentum, case.eps)
    grads = iter(
        torch.autograd.grad(y, [v for v, ask in zip(leaves, asked, strict=True) if ask], dy.to(y.dtype)) if any(asked) else ()
    )
    names = ("y", "running_mean", "running_var", "dx", "dweight", "dbias")
    return dict(zip(names, (y.detach(), *copies[3:], *(next(grads) if ask else None for ask in asked)), strict=True))


def rounding(case: Case, given: Operands, name: str, expected: torch.Tensor, of: torch.dtype) -> float:
    """What rounding may do: some units in the last place of the accumulation, of the largest of the terms that are added up,
    and of the result's own dtype."""
    acc = torch.float64 if of == torch.float64 else torch.float32
    x, _, weight, _, dy = (v if isinstance(v, torch.Tensor) else None for v in given)
    over = (0, *range(2, x.dim()))
    values = x.double()
    rstd = (values.var(over, correction=0) if case.training else given.running[1].double()).add(case.eps).rsqrt().max()
    gamma = 1.0 if weight is None else weight.double().abs().max()
    terms = {
        "y": gamma * rstd * (values.abs().max() + 2),
        "dx": gamma * rstd * dy.double().abs().max() * (1 + rstd * (values.abs().max() + 2)) ** 2,
        "dweight": dy.double().abs().sum() * rstd * (values.abs().max() + 2),
        "dbias": dy.double().abs().sum(),
        "running_mean": values.abs().max() + 2,
        "running_var": values.square().max() + 2,
    }[name]
    return float(64 * torch.finfo(acc).eps * terms + 1.01 * torch.finfo(of).eps * expected.detach().abs().max())


seen: set[Case] = set()


def hold_to_torch(device: str, case: Case) -> None:
    given = operands(case, device)
    ours, theirs = run(HF.batch_norm, case, given), run(F.batch_norm, case, given, double=True)
    seen.add(case)
    for name, expected in theirs.items():
        result = ours[name]
        assert (result is None) == (expected is None), name
        if result is not None:
            assert result.dtype == (
                given.x.dtype
                if name in ("y", "dx")
                else next(v.dtype for v in (*given.running, given.weight, given.bias) if v is not None)
            ), name
            assert result.shape == expected.shape, name
            if result.numel() and given.x.numel():
                torch.testing.assert_close(
                    result.double(), expected, rtol=0, atol=rounding(case, given, name, expected, result.dtype), equal_nan=True,
                    msg=lambda m, name=name: f"{name}: {m}",
                )  # fmt: skip


def spoil(case: Case, given: Operands) -> tuple[list[Any], bool, Any, Any, Any]:
    """The arguments of the call with what is wrong in it: tensors, training, momentum, eps, and whether it applies at all."""
    x, (mean, var), weight, bias, _ = given
    C, training, momentum, eps = x.shape[1], case.training, case.momentum, case.eps
    vector = next((v for v in (mean, weight, bias) if v is not None), torch.ones(C, device=x.device))
    wrong = torch.ones(C + 1, device=x.device, dtype=vector.dtype)
    if case.spoilt == "integers":
        x, mean, var, weight, bias = x.to(torch.int64), *(None if v is None else v.float() for v in (mean, var, weight, bias))
    elif case.spoilt == "one axis":
        x = x.reshape(-1)
    elif case.spoilt == "wrong weight":
        weight = wrong
    elif case.spoilt == "wrong bias":
        bias = wrong
    elif case.spoilt == "wrong running":
        mean, var = wrong, wrong.clone()
    elif case.spoilt == "weight of another dtype":
        weight = torch.ones(C, device=x.device, dtype=torch.float32 if x.dtype == torch.float64 else torch.float64)
    elif case.spoilt == "one of two running":
        training, mean, var = True, torch.zeros_like(vector), None
    elif case.spoilt == "no running in evaluation":
        training, mean, var = False, None, None
    elif case.spoilt == "running with gradient":
        mean, var = (torch.ones(C, device=x.device, dtype=vector.dtype).requires_grad_() for _ in range(2))
    elif case.spoilt == "eps 0 in training":
        training, eps = True, 0.0
    elif case.spoilt == "eps below 0":
        eps = -1e-5
    elif case.spoilt == "eps of no kind":
        eps = "small"
    elif case.spoilt == "momentum of no kind":
        momentum = None
    elif case.spoilt == "training of no kind":
        training = 1
    elif case.spoilt == "one value":
        training, x = True, torch.ones((1, C, *(1,) * (x.dim() - 2)), dtype=x.dtype, device=x.device)
    elif case.spoilt == "a list":
        weight = [1.0] * C
    return [x, mean, var, weight, bias], training, momentum, eps


def hold_to_torchs_refusal(device: str, case: Case) -> None:
    given = operands(case._replace(shape=(max(case.shape[0], 2), *case.shape[1:])), device)
    tensors, training, momentum, eps = spoil(case, given)
    before = [v.clone() if isinstance(v, torch.Tensor) else v for v in tensors]
    refusals = []
    for function in (HF.batch_norm, F.batch_norm):
        with pytest.raises(Exception) as refused:  # noqa: PT011 - which of them is what is compared
            function(*tensors, training, momentum, eps)
        refusals.append(refused.value)
        seen.add(case)
    ours, theirs = refusals
    assert isinstance(ours, type(theirs)), f"{ours!r} where PyTorch has {theirs!r}"
    assert "expected" in str(ours)
    for v, kept in zip(tensors, before, strict=True):
        assert not isinstance(v, torch.Tensor) or torch.equal(v, kept)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_combination_is_torchs(device, part):
    wanted = COMBINATIONS[requested_backend() if requested_backend() == "gpu" else "cpu"] // PARTS
    seen.clear()

    @seed(part)
    @settings(
        max_examples=int(1.2 * wanted), deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(SPOILT[part::PARTS]))
    def table(case: Case) -> None:
        if case.spoilt is None:
            hold_to_torch(device, case)
        else:
            hold_to_torchs_refusal(device, case)

    table()
    assert len(seen) >= wanted, f"{len(seen)} different combinations, of {wanted}"
    assert {case.spoilt for case in seen} >= set(SPOILT[part::PARTS]) or wanted < 200
