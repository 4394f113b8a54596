"""The command `hw3gpu`: what `info` tells, that `verify` finds a broken kernel, that `train` learns."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hw3gpu.__main__ import ROWS, main
from hw3gpu._cli import info, train, verify
from hw3gpu._core import dispatch

Captured = pytest.CaptureFixture[str]


# ---------------------------------------------------------------------------------------------- info
def test_info_tells_versions_devices_and_which_kernels_run(capsys: Captured) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"hw3gpu", "python", "numpy", "numba", "torch", "triton"} <= found["versions"].keys()
    assert found["devices"][0]["device"] == "cpu"
    choices = {choice["arrays"]: choice for choice in found["kernels"]}
    assert list(choices) == ["NumPy array", "torch CPU tensor", "torch CUDA tensor", "CuPy array"]
    assert choices["NumPy array"]["kernels"] == "Numba (cpu)"
    assert choices["NumPy array"]["why"] == "the array lives on the host"
    assert all(choice["why"] for choice in choices.values())
    cpu = found["cpu_kernels"]
    assert Path(cpu["cache"]).is_dir()
    assert cpu["threads"] >= 1
    assert cpu["recycled_MB"] >= 0


def test_info_says_why_a_forced_backend_cannot_run(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HW3GPU_BACKEND", "gpu")
    assert main(["info", "--json"]) == 0
    (numpy, *_) = json.loads(capsys.readouterr().out)["kernels"]
    assert numpy["kernels"] is None
    assert numpy["why"].startswith("backend 'gpu' was asked for, but ")


def test_info_says_where_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.dispatch, "backend", lambda *arrays: "gpu")
    monkeypatch.setenv("HW3GPU_BACKEND", "gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert info._choice("NumPy array", np.zeros(1)) == {
        "arrays": "NumPy array",
        "kernels": "Triton (gpu)",
        "why": "HW3GPU_BACKEND=gpu asks for them; TRITON_INTERPRET=1 interprets them",
    }


def test_info_prints_tables(capsys: Captured) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "Which kernels run" in printed
    assert "the array lives on the host" in printed


# ---------------------------------------------------------------------------------------------- verify
def test_verify_passes_with_the_cpu_kernels_for_every_row(capsys: Captured) -> None:
    status = main(["verify", "--kernels", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [check for check in found["checks"] if not check["passed"]] == []
    # and never because PyTorch has the same fault, such as a mean of 1e4 in one float32
    assert [check for check in found["checks"] if check["held_by"] not in ("both", "bound")] == []
    assert found["passed"]
    assert status == 0
    assert {(check["row"], check["arrays"]) for check in found["checks"]} == {
        (row, arrays) for row in ROWS for arrays in ("numpy", "torch")
    }


def test_verify_runs_the_triton_kernels_too(capsys: Captured) -> None:
    """From a process in which Triton does not interpret: `verify` starts one in which it does, if there is no GPU."""
    assert main(["verify", "--only", "S5"]) == 0
    printed = capsys.readouterr().out
    assert "S5 softmax_jacobian: Numba kernels" in printed
    assert "S5 softmax_jacobian: Triton kernels" in printed
    assert "failed" not in printed


def test_verify_of_some_dtypes(capsys: Captured) -> None:
    """Those of both processes, in one order."""
    assert main(["verify", "--kernels", "cpu", "--only", "S4", "S5", "S6", "--dtypes", "bfloat16", "float32", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    found = list(dict.fromkeys((check["row"], check["arrays"], check["dtype"]) for check in checks))
    assert found == [
        (row, *of) for row in ("S4", "S5", "S6") for of in (("numpy", "float32"), ("torch", "float32"), ("torch", "bfloat16"))
    ]


def test_verify_finds_a_kernel_that_is_slightly_wrong(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = dispatch.softmax("cpu")
    right = softmax.forward

    def wrong(z: Any, y: Any) -> None:
        right(z, y)
        y *= y.dtype.type(1 + 1e-5)

    monkeypatch.setattr(softmax, "forward", wrong)
    assert main(["verify", "--kernels", "cpu", "--only", "S4"]) == 1
    printed = capsys.readouterr().out
    assert "failed S4, softmax, softmax_backward, Numba kernels, numpy, float32, y N = 5" in printed


def test_verify_says_which_measure_holds_in_60_columns(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["verify", "--kernels", "cpu", "--only", "S4", "S9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    table = [line.split() for line in lines if line.startswith(("arrays", "numpy", "torch"))]
    assert table[0] == ["arrays", "dtype", "output", "error", "PyTorch", "bound", "held", "by"]
    cases = [row for row in table if row[0] != "arrays"]
    assert len(cases) == 11
    for row in cases:
        assert not any(cell.endswith("…") for cell in (*row[:2], *row[-4:]))
        assert row[-1] in ("both", "PyTorch", "bound")
        assert float(row[-2]) >= 0


def test_a_result_passes_by_either_measure() -> None:
    """Where PyTorch is exact by luck the bound decides, and where there is hardly a bound, PyTorch."""
    import numpy as np

    from hw3gpu._cli.operations import Output

    expected, ours = np.array([1.0, 3.0]), np.array([1.0 + 4e-16, 3.0])
    for theirs, bound, held_by in (
        (ours, 2**-50, "both"), (ours + 1e-15, 0.0, "PyTorch"), (expected, 2**-50, "bound"), (expected, 0.0, "neither"),
    ):  # fmt: skip
        found = verify._measure(Output("y", ours + 4e-16, expected, theirs, bound))
        assert (found["held_by"], found["passed"]) == (held_by, held_by != "neither"), found


SETTINGS = {
    "HW3GPU_BACKEND": "one of auto, gpu, cpu",
    "HW3GPU_CPU_CACHE_MB": "a number of megabytes of at least 0",
    "HW3GPU_NUM_THREADS": "a number of threads of at least 1",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_verify_refuses_a_wrong_setting_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "foo")
    with pytest.raises(SystemExit, match=rf"^{name}: expected {SETTINGS[name]}, got 'foo'$"):
        main(["verify", "--only", "S1"])


def test_verify_mends_the_interpreter_that_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    mended: list[bool] = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(verify, "_without_triton", lambda: False)
    monkeypatch.setattr(verify, "mend_the_interpreter", lambda: mended.append(True))
    monkeypatch.setattr(verify, "_checks", lambda *_: iter(()))
    assert list(verify.run("gpu", ["S4"])) == []
    assert mended == [True]


def test_verify_goes_on_after_a_kernel_that_raises(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(dispatch.softmax("cpu"), "backward", broken)
    assert main(["verify", "--kernels", "cpu", "--only", "S4", "S9", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    notes = {check["note"] for check in checks if not check["passed"]}
    assert notes == {"RuntimeError: out of order"}
    assert {check["row"] for check in checks if check["passed"]} == {"S4", "S9"}


def test_verify_counts_nan_in_a_wrong_place_as_a_failure() -> None:
    import numpy as np

    from hw3gpu._cli.operations import Output

    reference = np.array([1.0, np.nan, -np.inf])
    for ours, passes in (([1, np.nan, -np.inf], True), ([1, 0, -np.inf], False), ([1, np.nan, np.inf], False)):
        found = verify._measure(Output("y", np.array(ours), reference, reference, 0.0))
        assert found["passed"] is passes
        assert found["held_by"] == ("both" if passes else "neither")
        assert (found["error"] is None) is (not passes)
        assert bool(found["note"]) is (not passes)


# ---------------------------------------------------------------------------------------------- train
def test_an_epoch_says_when_a_step_is_done() -> None:
    data = train.Digits(torch.rand(150, 3), torch.zeros(150, dtype=torch.int64), torch.rand(1, 3), torch.zeros(1))
    run, done = train.Run("ours", torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()), []
    run.epoch(data, torch.arange(150), lambda: done.append(len(done)))
    assert len(done) == len(run.losses) == -(-150 // train.BATCH)


def test_train_learns_as_pytorch_does(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets: list[train.Run] = []
    learn = train.train
    monkeypatch.setattr(train, "train", lambda *arguments: nets.extend(learn(*arguments)) or tuple(nets))
    png = tmp_path / "curves" / "train.png"
    assert main(["train", "--epochs", "3", "--output", str(png), "--device", "cpu"]) == 0

    ours, theirs = nets
    data = train.Digits.load(0, torch.device("cpu"))
    assert ours.accuracy(data) > 0.97
    assert theirs.accuracy(data) > 0.97
    assert len(ours.losses) == len(theirs.losses) == 3 * -(-len(data.x) // train.BATCH)
    # rounding alone separates the nets, until training has amplified it
    assert max(abs(a - b) for a, b in zip(ours.losses[:10], theirs.losses[:10], strict=True)) < 1e-5
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(png) in printed
    assert f"{100 * ours.accuracy(data):.2f} %" in printed


def test_train_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"pip install 'hw3gpu\[demo\]'"):
        main(["train", "--output", str(tmp_path / "train.png")])
    assert not (tmp_path / "train.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [["verify", "--kernels", "tpu"], ["verify", "--only", "S10"], []],
    ids=["unknown kernels", "unknown row", "no command"],
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: hw3gpu" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- wrong arguments
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "x"], "argument --epochs: expected an integer, got 'x'"),
        (["--epochs", "0"], "argument --epochs: expected 1 or more, got 0"),
        (["--seed", "-1"], "argument --seed: expected 0 to 2^32 - 1, got -1"),
        (["--seed", str(2**32)], "argument --seed: expected 0 to 2^32 - 1, got 4294967296"),
        (["--device", "banana"], "argument --device: expected cpu, cuda or cuda:N, got 'banana'"),
        (["--device", "meta"], "argument --device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "argument --device: cuda:99 is not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_wrong_arguments_in_a_line(arguments: list[str], message: str, capsys: Captured, untrained: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--output", str(untrained / "train.png"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(untrained.iterdir()) == []


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, for a command that must not come as far as to train."""
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained"))
    return tmp_path


def test_train_refuses_an_output_that_cannot_be_written_before_it_trains(capsys: Captured, untrained: Path) -> None:
    (untrained / "file").write_text("as it was")
    (untrained / "folder").mkdir()
    for output, why in ((untrained / "folder", "Is a directory"), (untrained / "file" / "train.png", "")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--output", str(output)])
        assert stopped.value.code == 2
        assert f"argument --output: {output} cannot be written: {why}" in capsys.readouterr().err
    assert (untrained / "file").read_text() == "as it was"


def test_train_leaves_an_output_of_before_alone_until_it_has_trained(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    (tmp_path / "train.png").write_text("of before")
    assert main(["train", "--output", str(tmp_path / "train.png")]) == 130
    assert capsys.readouterr().err.strip() == "hw3gpu train: interrupted"
    assert (tmp_path / "train.png").read_text() == "of before"


@pytest.mark.parametrize("command", ["info", "train"])
def test_an_unknown_backend_is_named(command: str, capsys: Captured, untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HW3GPU_BACKEND", "foo")
    why = "HW3GPU_BACKEND: expected one of auto, gpu, cpu, got 'foo'"
    if command == "info":
        assert main(["info", "--json"]) == 0
        assert [choice["why"] for choice in json.loads(capsys.readouterr().out)["kernels"][:2]] == [why] * 2
    else:
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--output", str(untrained / "train.png")])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"hw3gpu train: {why}\n"


@pytest.mark.parametrize("command", ["info", "train"])
@pytest.mark.parametrize("name", ["HW3GPU_CPU_CACHE_MB", "HW3GPU_NUM_THREADS"])
def test_a_wrong_setting_is_named(
    command: str, name: str, capsys: Captured, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "foo")
    why = f"hw3gpu {command}: {name}: expected {SETTINGS[name]}, got 'foo'\n"
    if command == "info":
        assert main(["info"]) == 2
    else:
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--output", str(untrained / "train.png")])
        assert stopped.value.code == 2
    assert capsys.readouterr().err == why


# ---------------------------------------------------------------------------------------------- make demo
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("found", "learned"), [(0, 0), (1, 0), (0, 3)])
def test_the_demo_trains_whatever_verify_found_and_tells_it(tmp_path: Path, found: int, learned: int) -> None:
    command = tmp_path / "hw3gpu"
    command.write_text(f'#!/bin/sh\necho "ran $1"\ncase $1 in verify) exit {found};; *) exit {learned};; esac\n')
    command.chmod(0o755)
    (tmp_path / "installed").touch()
    made = subprocess.run(
        ["make", "--no-print-directory", "demo", f"BIN={tmp_path}", f"INSTALLED={tmp_path / 'installed'}"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert made.stdout.splitlines()[:2] == ["ran verify", "ran train"]
    assert (made.returncode == 0) is (found == learned == 0)
