"""`hw3gpu.distributed` and the modules among 2 and 4 processes (gloo), against the answer of one.

A process costs an import of torch: all checks of `distributed_checks.py` run in one set of four processes, which make two
groups of two for the checks among two.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable

import pytest
from distributed_checks import checks_of, main

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# among processes whose kernels run in the interpreter, which is slow
INTERPRETED = (
    "sync_batch_norm_is_that_of_all_batches",
    "sync_batch_norm_of_a_process_without_samples",
    "sync_batch_norm_far_from_zero",
    "vocab_parallel_cross_entropy_of_every_shape",
    "vocab_parallel_cross_entropy_with_every_option",
    "vocab_parallel_cross_entropy_keeps_the_digits_where_p_is_near_1",
    "vocab_parallel_cross_entropy_of_infinite_logits",
    "distributed_data_parallel_trains_as_one_process",
)


PLANS = {"cpu": {size: checks_of(size) for size in (2, 4)}, "gpu": {2: INTERPRETED}}


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """`main`, which one worker of pytest-xdist runs for all of them: the others wait for it, and read what it found."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def run(backend: str) -> dict[str, str]:
        found = folder / f"distributed-{backend}.json"
        with (folder / "distributed.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not found.exists():
                found.write_text(json.dumps(main(backend, PLANS[backend])))
        return json.loads(found.read_text())

    return run


@pytest.mark.parametrize(("processes", "name"), [(size, name) for size, names in PLANS["cpu"].items() for name in names])
def test_among_processes(said: Callable[..., dict[str, str]], processes: int, name: str) -> None:
    wrong = said("cpu")[f"{processes} {name}"]
    assert not wrong, wrong


@pytest.mark.interpreter
@pytest.mark.parametrize("name", INTERPRETED)
def test_triton_kernels_among_processes(said: Callable[..., dict[str, str]], name: str) -> None:
    wrong = said("gpu")[f"2 {name}"]
    assert not wrong, wrong
