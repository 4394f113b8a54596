"""Plans that were measured to be faster on a device than the computed ones: `tuned.json` in this folder, if it exists.

`python -m benchmarks gpu --tune` writes such a file. It holds, for the name of a device, entries like

    {"plan": "plan_rows", "given": {"V": 32000, …}, "instead_of": {"num_warps": 16, …}, "use": {"num_warps": 8}}

An entry holds for a call of that plan function with these arguments, as long as the function still gives the plan that the
entry was measured against. It may change how a tile is divided among threads and programs and how far ahead it is loaded, never
how accurately sums are made: the bounds of docs/errors.md hold for every plan accepted here. Reading a file with any other
entry raises ValueError.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

FILE = Path(__file__).with_name("tuned.json")

Plan = TypeVar("Plan", bound=Any)
Given = dict[str, Any]  # the arguments of a plan function, without the device
Trial = Callable[[str, str, Given, Any], Any]

_changes: dict[str, tuple[type, Callable[[Any, Given, dict[str, int]], Any]]] = {}  # by plan function
_trial: Trial | None = None


def tunable(change: Callable[[Any, Given, dict[str, int]], Any]) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Decorates a plan function whose plans the table may change. change(plan, given, use): the changed plan, or ValueError."""

    def wrap(plan_function: Callable[..., Plan]) -> Callable[..., Plan]:
        signature, name = inspect.signature(plan_function), plan_function.__name__

        @functools.wraps(plan_function)
        def planned(*args: Any, **kwargs: Any) -> Plan:
            plan = plan_function(*args, **kwargs)
            if _trial is None and not _table():
                return plan
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            device = given.pop("device").name
            if _trial is not None:
                return _trial(device, name, given, plan)
            return _table().get((device, name, _key(given), plan), plan)

        _changes[name] = plan_function.__globals__[signature.return_annotation], change
        return planned

    return wrap


def changed(name: str, given: Given, plan: Plan, use: dict[str, int]) -> Plan:
    """The plan of the function `name` with the numbers `use`; ValueError where they could change more than its speed."""
    of = _changes[name][1](plan, given, use)
    if of == plan:
        raise ValueError(f"use: expected something else than the plan has, got {use}")
    return of


# ---------------------------------------------------------------------------------------------- what may be changed
def _is_power_of_2(n: Any) -> bool:
    return isinstance(n, int) and n > 0 and n & (n - 1) == 0


def _check(use: dict[str, int], rules: dict[str, bool], name: str) -> None:
    """ValueError unless `use` has only fields of `rules`, whose value is whether the number asked for is allowed."""
    if not use or set(use) - set(rules):
        raise ValueError(f"use: expected some of {sorted(rules)} for {name}, got {use}")
    for field, right in rules.items():
        if field in use and not right:
            raise ValueError(f"use: {field} = {use[field]!r} cannot be that of {name}")


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def of_rows(plan: Any, given: Given, use: dict[str, int]) -> Any:
    """Changes a `RowPlan`: of rows with a tail KEEP may become smaller, and BLOCK_V no smaller than 256 lanes."""
    asked = asdict(plan) | use
    least, loops = min(256, plan.BLOCK_V), not plan.FITS or plan.programs > 0
    _check(use, {
        "num_warps": _is_power_of_2(asked["num_warps"]) and asked["num_warps"] <= 32,
        "STAGES": loops and _whole(asked["STAGES"], 1, 8),
        "registers": asked["registers"] is None or (_whole(asked["registers"], 24, 248) and asked["registers"] % 8 == 0),
        "programs": plan.programs > 0 and _whole(asked["programs"], 1, 1 << 16),
        "KEEP": not plan.FITS and plan.KEEP > 0 and _is_power_of_2(asked["KEEP"]) and asked["KEEP"] <= plan.KEEP,
        "BLOCK_V": not plan.FITS and _is_power_of_2(asked["BLOCK_V"]) and least <= asked["BLOCK_V"] <= (asked["KEEP"] or 8192),
    }, "a RowPlan")  # fmt: skip
    return replace(plan, **use)


def as_vector(plan: Any, given: Given, use: dict[str, int]) -> Any:
    """Changes a `BatchNormPlan`: of one tile the warps alone; of several their shape and splits too.

    `halvings` stays as it is, and so does whether a channel is one tile: they decide how sums are rounded.
    """
    from .plan import body_lanes, cdiv

    asked = asdict(plan) | use
    loops = plan.tiles > 1
    free = loops and not plan.flat
    lanes = body_lanes(given["S"], given["itemsize"], given["mode"])
    _check(use, {
        "num_warps": _is_power_of_2(asked["num_warps"]) and asked["num_warps"] <= 32,
        "stages": loops and _whole(asked["stages"], 1, 4),
        "splits": loops and _whole(asked["splits"], 1, min(plan.tiles, 1024)),
        "BLOCK_N": free and _is_power_of_2(asked["BLOCK_N"]) and asked["BLOCK_N"] < 2 * given["N"],
        "LANES": free and _is_power_of_2(asked["LANES"]) and min(64, plan.LANES) <= asked["LANES"] < 2 * lanes,
    }, "a BatchNormPlan")  # fmt: skip
    if not loops:
        return replace(plan, **use)
    if plan.BLOCK_C * asked["BLOCK_N"] * asked["LANES"] > 16384:
        raise ValueError(f"use: a tile of more than 16384 values, {use}, cannot be that of a BatchNormPlan")
    lane_blocks = max(cdiv(lanes, asked["LANES"]), 1)
    tiles = max(cdiv(given["N"], asked["BLOCK_N"]), 1) * lane_blocks
    if tiles == 1:
        raise ValueError(f"use: one tile of a channel, {use}, where the plan has {plan.tiles}")
    per_split = cdiv(tiles, min(asked["splits"], tiles))
    rest = {"ROWS": asked["BLOCK_N"], "lane_blocks": lane_blocks, "tiles": tiles, "per_split": per_split}
    return replace(plan, **(use | rest | {"splits": cdiv(tiles, per_split)}))


# ---------------------------------------------------------------------------------------------- the table
def _key(given: Given) -> str:
    return json.dumps(given, sort_keys=True)


def read(text: str, name: str = "tuned.json") -> dict[tuple[str, str, str, Any], Any]:
    """The plan to use, by (device, plan function, arguments, computed plan); ValueError where `text` is not such a table."""
    from . import channel_plan, row_plan  # noqa: F401  (registers their plan functions)

    found: dict[tuple[str, str, str, Any], Any] = {}
    try:
        table = json.loads(text)
        entries = [(device, entry) for device, of in table.items() for entry in of]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{name}: expected an object of lists, by device ({error})") from None
    for device, entry in entries:
        try:
            of = _changes[entry["plan"]][0]
            plan = of(**entry["instead_of"])
            key = device, entry["plan"], _key(entry["given"]), plan
            found[key] = changed(entry["plan"], entry["given"], plan, entry["use"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{name}: {device}: {entry}: {type(error).__name__}: {error}") from None
    return found


@functools.cache
def _table() -> dict[tuple[str, str, str, Any], Any]:
    return read(FILE.read_text(), str(FILE)) if FILE.exists() else {}


def try_plans(trial: Trial | None) -> None:
    """From now on trial(device, plan function, arguments, plan) chooses each plan; None ends that. For `--tune`."""
    global _trial
    _trial = trial
