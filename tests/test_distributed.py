"""`hw3gpu.distributed` and the modules among 2 and 4 processes (gloo), against the answer of one.

All checks of `distributed_checks.py` run in one set of four processes, which make two groups of two for the checks among two;
they are forks of one that has imported torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_checks import checks_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# among processes whose kernels run in the interpreter, which is slow
INTERPRETED = (
    "sync_batch_norm_is_that_of_all_batches",
    "sync_batch_norm_of_a_process_without_samples",
    "sync_batch_norm_far_from_zero",
    "sync_batch_norm_of_the_positions_that_count",
    "vocab_parallel_cross_entropy_of_every_shape",
    "vocab_parallel_cross_entropy_with_every_option",
    "vocab_parallel_cross_entropy_keeps_the_digits_where_p_is_near_1",
    "vocab_parallel_cross_entropy_of_infinite_logits",
    "vocab_parallel_token_log_probs_of_every_shape",
    "vocab_parallel_linear_cross_entropy_with_every_option",
    "vocab_parallel_linear_cross_entropy_whose_statistics_have_gradients",
    "vocab_parallel_linear_cross_entropy_against_the_answer_sheet",
    "distributed_data_parallel_trains_as_one_process",
)


HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
PLANS = {"cpu": {size: checks_of(size) for size in (2, 4)}, "gpu": {2: INTERPRETED}}


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """What the processes found, which one worker of pytest-xdist starts for all of them: the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def run(backend: str) -> dict[str, str]:
        found = folder / f"distributed-{backend}.json"
        with (folder / "distributed.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not found.exists():
                command = [sys.executable, HERE / "distributed_checks.py", backend, json.dumps(PLANS[backend]), found]
                done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
                if done.returncode:
                    names = (f"{size} {name}" for size, names in PLANS[backend].items() for name in names)
                    found.write_text(json.dumps(dict.fromkeys(names, done.stderr)))
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
