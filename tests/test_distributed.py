"""`hw3gpu.distributed` and the modules among 2 and 4 processes (gloo), against the answer of one.

A process costs an import of torch: all checks of `distributed_checks.py` run in one set of processes of each size.
"""

from __future__ import annotations

import functools

import pytest
from distributed_checks import checks_of, main

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # one worker of pytest-xdist starts the processes of a size, and has the results of all their checks
    pytest.mark.xdist_group("distributed"),
]

results = functools.cache(main)


@pytest.mark.parametrize(("processes", "name"), [(size, name) for size in (2, 4) for name in checks_of(size)])
def test_among_processes(processes: int, name: str) -> None:
    said = results(processes, "cpu")[name]
    assert not said, said
