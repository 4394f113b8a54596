"""What SECURITY.md promises: imports that start nothing, and a cache that others can neither write nor plant."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEPT_APART = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no owners and modes of POSIX")

# imports every module of the package, the kernels too, and prints what Python's audit events tell of processes and sockets
WATCHED = """
import importlib, importlib.util, pathlib, sys
seen = []
processes = "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "pty."
starts = processes + ("socket.", "urllib.")
sys.addaudithook(lambda event, args: seen.append((event, repr(args)[:80])) if event.startswith(starts) else None)
import hw3gpu
root = pathlib.Path(hw3gpu.__file__).parent
names = []
for top in root, root / "kernels":  # the second is a link in a checkout, which rglob does not follow
    names += [".".join(("hw3gpu", *p.relative_to(root).with_suffix("").parts)) for p in sorted(top.rglob("*.py"))]
names = sorted({name.removesuffix(".__init__") for name in names if not name.endswith("__main__")})
no_triton = importlib.util.find_spec("triton") is None
for name in names:
    if not (no_triton and name.startswith("hw3gpu.kernels.gpu")):
        importlib.import_module(name)
assert len(names) > 80 and "hw3gpu.kernels.cpu.softmax" in names, names
print(seen)
"""


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_start_no_process_and_open_no_socket() -> None:
    assert _run(WATCHED) == "[]"


def test_audit_hook_would_see_a_process_and_a_socket() -> None:
    heads = WATCHED.partition("import hw3gpu")[0]
    code = heads + "import socket, subprocess; socket.socket().close(); subprocess.run([sys.executable, '-c', ''])\nprint(seen)"
    seen = _run(code)
    assert "socket.__new__" in seen
    assert "subprocess.Popen" in seen


# ---------------------------------------------------------------------------------------------- the cache of compiled kernels
# Numba keeps what it has compiled in pickled files: whoever may write them may run code as the one who reads them.
FOLDER = """
import os, warnings
os.umask(0o002)
warnings.simplefilter("error" if {strict} else "ignore")
from hw3gpu.kernels.cpu._numba import compile
print(compile.cache_folder())
"""


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


@KEPT_APART
def test_cache_folders_are_made_for_the_user_alone(tmp_path: Path) -> None:
    found = _run(FOLDER.format(strict=True), XDG_CACHE_HOME=str(tmp_path / "cache"), NUMBA_CACHE_DIR="")
    assert Path(found) == tmp_path / "cache" / "hw3gpu" / "kernels-cpu"
    assert _mode(tmp_path / "cache" / "hw3gpu") == _mode(Path(found)) == 0o700


@KEPT_APART
def test_cache_folder_of_numba_is_the_users_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)  # one that all may write to, such as /tmp
    found = _run(FOLDER.format(strict=True), NUMBA_CACHE_DIR=str(tmp_path))
    assert Path(found) == tmp_path / "kernels-cpu"
    assert _mode(Path(found)) == 0o700


@KEPT_APART
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_cache_folder_that_others_may_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    planted = tmp_path / "kernels-cpu"
    planted.mkdir()
    planted.chmod(mode)
    assert _run(FOLDER.format(strict=False), NUMBA_CACHE_DIR=str(tmp_path)) == "None"
    code = FOLDER.format(strict=False).replace('"ignore"', '"default"') + "import sys; sys.stdout = sys.stderr"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert f"RuntimeWarning: {planted} may be written by others" in done.stderr
    assert "chmod 700" in done.stderr


@KEPT_APART
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder to another user")
def test_cache_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    planted = tmp_path / "kernels-cpu"
    planted.mkdir(mode=0o700)
    os.chown(planted, 12345, -1)
    assert _run(FOLDER.format(strict=False), NUMBA_CACHE_DIR=str(tmp_path)) == "None"


# ---------------------------------------------------------------------------------------------- what runs data as code
def test_no_module_unpickles_or_talks_to_a_network() -> None:
    """Of the standard library and of PyTorch; Numba's own cache is the one place, and the folder above the reason."""
    refused = {"pickle", "dill", "marshal", "shelve"} | {"socket", "ssl", "http", "urllib", "ftplib", "requests", "httpx"}
    called = {"eval", "exec", "compile", "__import__"}
    found = []
    for path in sorted([*(ROOT / "hw3gpu").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(name, alias.name) for alias in node.names if alias.name.partition(".")[0] in refused]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found += [(name, node.module)] if (node.module or "").partition(".")[0] in refused else []
            elif isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                found += [(name, text)] if text in called or text == "torch.load" else []
    expected = [
        ("hw3gpu/_nn/fusion.py", "compile"),  # torch.fx's text of a forward that the caller gave as code
        ("hw3gpu/_nn/fusion.py", "exec"),
        ("kernels/gpu/launch.py", "exec"),  # its text is made of its own names and of integers
    ]
    assert sorted(found) == expected
