"""`python -m benchmarks gpu --tune`: other plans for a row's launches; the best are written for `kernels/gpu/tuned.py`.

One number of one plan after the other is changed, on top of what was best before; all its values are timed in turn with that,
in CUDA graphs with a cold cache. A plan is better where the upper quartile of its time over the other's is below GAIN, and its
results agree. What is best at the end is timed once more beside the plan as it is computed. Only what `tuned.changed` allows
is tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hw3gpu._torch import bound_launches
from hw3gpu.kernels.gpu import tuned

from . import gpu_checks
from .cuda_clock import Passes, Step
from .harness import Deadline, Results, Spread, replace, told
from .rows import Inputs, Row, contestants, inputs

if TYPE_CHECKING:
    from .gpu import Gpu

GAIN = 0.98
ABOUT = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest result
ROW_SECONDS = 60.0  # at most, for a row
PASSES = ("forward", "backward")


def _times(*factors: float) -> Callable[[Any], list[int]]:
    return lambda value: [int(value * factor) for factor in factors if value and value * factor >= 1]


# what is tried of each number of a plan, given the one that it has
FIELDS: dict[str, dict[str, Callable[[Any], list[Any]]]] = {
    "plan_rows": {
        "num_warps": _times(0.5, 2),
        "STAGES": lambda stages: [n for n in range(stages - 1, stages + 3) if n != stages],
        "BLOCK_V": _times(0.5, 2),
        "KEEP": _times(0.5),
        "programs": _times(0.5, 2),
        "registers": lambda registers: [n for n in (None, 64, 80, 128, 168) if n != registers],
    },
    "plan_batch_norm": {
        "num_warps": _times(0.5, 2),
        "splits": _times(0.5, 2, 4),
        "LANES": _times(0.5, 2),
        "BLOCK_N": _times(0.5, 2),
        "stages": lambda stages: [n for n in (1, 2, 3) if n != stages],
    },
}


@dataclass
class Asked:
    """A plan that a row asks for: by whom, with which arguments, and in which passes."""

    device: str
    name: str
    given: dict[str, Any]
    plan: Any
    passes: set[str] = field(default_factory=set)
    use: dict[str, Any] = field(default_factory=dict)  # what was found better

    @property
    def key(self) -> tuple[str, str]:
        return self.name, json.dumps(self.given, sort_keys=True)

    def candidates(self, number: str) -> Iterator[dict[str, Any]]:
        """What is found better so far, with other values of one number; only what may be used."""
        for value in FIELDS[self.name][number](getattr(self.plan, number)):
            use = self.use | {number: value}
            try:
                tuned.changed(self.name, self.given, self.plan, use)
            except ValueError:
                continue
            yield use


class Trial:
    """While it is on, plans are those computed, but for what is `use`d of some; and it notes who asks for which."""

    def __init__(self) -> None:
        self.asked: dict[tuple[str, str], Asked] = {}
        self.during = PASSES[0]

    def __enter__(self) -> Trial:
        bound_launches.forget()
        tuned.try_plans(self)
        return self

    def __exit__(self, *error: object) -> None:
        tuned.try_plans(None)
        bound_launches.forget()

    def __call__(self, device: str, name: str, given: dict[str, Any], plan: Any) -> Any:
        asked = Asked(device, name, given, plan)
        asked = self.asked.setdefault(asked.key, asked)
        asked.passes.add(self.during)
        return tuned.changed(name, given, plan, asked.use) if asked.use else plan

    def watched(self, step: Step) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Forward and backward, and who asks in which."""
        self.during = "forward"
        result = step.forward()
        self.during = "backward"
        return result, step.backward(result)


def tune_row(gpu: Gpu, row: Row, results: Results, deadline: Deadline) -> None:
    """Tries the plans of one row, and adds what is better to `tuned.json` of the results."""
    until = Deadline(min(deadline.at, time.time() + ROW_SECONDS))
    given = inputs(row, gpu.name)
    made = contestants(row, given, gpu.compiled)
    step = made["hw3gpu"]()
    with Trial() as trial:
        expected = trial.watched(step)
        for asked in filter(launched, list(trial.asked.values())):
            for number in FIELDS[asked.name]:
                if until.left > 0:
                    try_number(gpu, step, asked, number, expected, results)
            if asked.use and right(gpu, row, given, step, made["eager"]()):
                confirm(gpu, step, asked, row, results)
    if until.left <= 0:
        results.parts.setdefault("not_tuned_to_the_end", []).append(row.name)


def launched(asked: Asked) -> bool:
    """False for a plan that a batch norm makes only to see whether a channel is one tile."""
    return not (asked.given.get("whole") and asked.plan.tiles > 1)


def try_number(gpu: Gpu, step: Step, asked: Asked, number: str, expected: Any, results: Results) -> None:
    """Times all values of one number in turn with the best so far; that one is the best from then on which gains most."""
    before, best = asked.use, GAIN
    uses = [before, *asked.candidates(number)]
    for use, ratio in timed(gpu, step, asked, uses, expected, results).items():
        if ratio.high < GAIN and ratio.median < best:
            asked.use, best = json.loads(use), ratio.median


def right(gpu: Gpu, row: Row, given: Inputs, step: Step, eager: Step) -> bool:
    """Whether the results, with the plans as they are now, are held by the answer sheet."""
    if gpu.pretended:
        return True
    bound_launches.forget()
    found = []
    for of in (step, eager):
        result = of.forward()
        found.append((result, of.backward(result)))
    return not gpu_checks.row_check(row, given, *found)


def confirm(gpu: Gpu, step: Step, asked: Asked, row: Row, results: Results) -> None:
    """Keeps what was found if it is better than the plan as it is computed once more."""
    for use, ratio in timed(gpu, step, asked, [{}, asked.use], None, results).items():
        if ratio.high < GAIN:
            keep(asked, json.loads(use), ratio, row, results, gpu.pretended)


def timed(
    gpu: Gpu, step: Step, asked: Asked, uses: list[dict[str, Any]], expected: Any, results: Results
) -> dict[str, Spread]:  # fmt: skip
    """Times over that of the first of `uses`, in the passes that ask for the plan, of the others that can be launched."""
    graphs: dict[str, Passes] = {}
    best = asked.use
    for use in uses:
        asked.use = use
        bound_launches.forget()
        gpu.mark("")
        try:
            if expected is not None:
                agree(gpu, step, expected)
            graphs[json.dumps(use)] = gpu.clock.captured(step)
        except Exception as error:  # a plan that does not compile, or does not fit, is none
            results.parts.setdefault("plans_that_failed", []).append(f"{asked.name} {asked.given} {use}: {told(error)}")
        if json.dumps(use) not in graphs:
            gpu.clock.clear()
    asked.use, first = best, json.dumps(uses[0])
    found: dict[str, Spread] = {}
    if first in graphs:
        turns = totals(gpu, asked, graphs)
        found = {name: Spread.ratio(of, turns[first]) for name, of in turns.items() if name != first}
        for name, ratio in found.items():
            note = {"plan": asked.name, "given": asked.given, "over": uses[0], "use": json.loads(name)}
            results.parts.setdefault("tried", []).append(note | {"time_over": asdict(ratio)})
    graphs.clear()
    bound_launches.forget()
    gpu.clock.free()
    return found


def agree(gpu: Gpu, step: Step, expected: tuple[torch.Tensor, tuple[torch.Tensor, ...]]) -> None:
    """AssertionError unless forward and backward give about what they gave with the plan as it is computed."""
    result = step.forward()
    gradients = step.backward(result)
    if not gpu.pretended:
        for found, of in zip((result, *gradients), (expected[0], *expected[1]), strict=True):
            off, largest = (float(x.abs().max()) for x in ((found - of).detach(), of.detach()))
            assert off <= ABOUT[of.dtype] * largest, f"{off:.2e} off results of up to {largest:.2e}"


def totals(gpu: Gpu, asked: Asked, graphs: dict[str, Passes]) -> dict[str, list[float]]:
    """Microseconds of the passes that ask for the plan, together, turn by turn, of each graph."""
    sums: dict[str, list[float]] = {}
    for of in sorted(asked.passes):
        times = gpu.clock.in_turn({name: getattr(passes, of) for name, passes in graphs.items()}, gpu.seconds(0.5), most=20)
        for name, turns in times.turns.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(turns)), turns, strict=False)]
    fewest = min(map(len, sums.values()))
    return {name: turns[:fewest] for name, turns in sums.items()}


def keep(asked: Asked, use: dict[str, Any], ratio: Spread, row: Row, results: Results, pretended: bool) -> None:
    """Writes an entry of the table; it takes the place of one for the same arguments."""
    entry: dict[str, Any] = {
        "plan": asked.name, "given": asked.given, "instead_of": asdict(asked.plan), "use": use, "row": row.name,
        "time_over": asdict(ratio),
    }  # fmt: skip
    device = f"pretended {asked.device}" if pretended else asked.device
    path = results.folder / "tuned.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    others = [old for old in table.get(device, []) if (old["plan"], old["given"]) != (asked.name, asked.given)]
    text = json.dumps(table | {device: [*others, entry]}, indent=1) + "\n"
    tuned.read(text, str(path))  # what is written can be read
    replace(path, text)
    results.parts.setdefault("better_plans", []).append(f"{row.name}: {asked.name} with {use}: {ratio} of its time")
