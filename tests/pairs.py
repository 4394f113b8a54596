"""Rows of options in which every two levels of every two factors meet, as few as a greedy choice finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True, tries: int = 30, seed: int = 0
) -> list[Row]:
    """Rows, one level a factor, that are `allowed` and together hold every pair of levels that an allowed row can hold.

    Greedy (Cohen, Dalal, Fredman and Patton: The AETG System, 1997): of `tries` random rows, each around a pair that no row
    holds yet and the other factors in random order at the level that adds most pairs, the one with most. `allowed` is asked
    of partial rows too, with the factors that are chosen so far.
    """
    rng, names = random.Random(seed), list(factors)
    wanted = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
        if allowed({a: factors[a][i], b: factors[b][j]})
    }

    def row_of(chosen: dict[str, int]) -> Row:
        return {name: factors[name][i] for name, i in chosen.items()}

    def completed(pair: Any) -> dict[str, int] | None:
        chosen = dict(pair)
        for name in rng.sample(names, len(names)):
            if name in chosen:
                continue
            levels = rng.sample(range(len(factors[name])), len(factors[name]))
            possible = [i for i in levels if allowed(row_of({**chosen, name: i}))]
            if not possible:
                return None
            chosen[name] = max(possible, key=lambda i: sum(frozenset(((name, i), other)) in wanted for other in chosen.items()))
        return chosen

    rows: list[Row] = []
    ordered = sorted(wanted, key=lambda pair: sorted(map(str, pair)))
    rng.shuffle(ordered)
    for pair in ordered:
        if pair not in wanted:
            continue
        candidates = [row for row in (completed(pair) for _ in range(tries)) if row is not None]
        if not candidates:  # no allowed row holds it
            wanted.discard(pair)
            continue
        best = max(candidates, key=lambda row: len(wanted & held(row)))
        wanted -= held(best)
        rows.append({name: row_of(best)[name] for name in names})
    return rows


def held(chosen: Mapping[str, int]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
