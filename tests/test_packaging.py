"""What is installed: one package, `hw3gpu`, with the kernels inside it, and nothing else at the top level.

`kernels/` is a folder of the checkout that installs as `hw3gpu.kernels`; a wheel with a top-level `kernels` would
overwrite another project's package of that name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

import hw3gpu

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = (
    "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "hw3gpu", "kernels"
)  # fmt: skip


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def _run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that has to succeed; its environment has no import path of this process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HW3GPU", "TRITON"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _build(source: Path, output: Path, *kinds: str) -> None:
    _run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", output, source, cwd=source)


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def _files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel and the sdist of a copy of this checkout, and the wheel that the sdist gives."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in INSTALLED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    (source / "kernels" / "gpu" / "tuned.json").write_text("{}")  # plans measured on a device, which a checkout may have
    _build(source, folder / "wheel", "--wheel")
    _build(source, folder / "sdist", "--sdist")
    sdist = _only(folder / "sdist", "*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    _build(_only(folder / "unpacked", "*"), folder / "again", "--wheel")
    return Built(_only(folder / "wheel", "*.whl"), sdist, _only(folder / "again", "*.whl"))


@pytest.fixture(scope="module")
def clean(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment in which the wheel alone is installed.

    The heavy dependencies come from the running environment, by a .pth file that appends its site-packages to the new
    one's path. Files of that kind are not read in a folder appended so: an editable install of this checkout, which the
    running environment may have, stays invisible.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        built.wheel,
        cwd=folder,
    )
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder / "bin"


def test_wheel_holds_hw3gpu_and_nothing_else_at_the_top(built: Built) -> None:
    top = {name.partition("/")[0] for name in _files(built.wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hw3gpu"}


def test_wheel_holds_every_source_file(built: Built) -> None:
    kept = (".py", ".md", ".json", "py.typed")
    sources = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in (("hw3gpu", "hw3gpu"), ("kernels", "hw3gpu/kernels"))
        for path in (ROOT / folder).rglob("*")
        if path.name.endswith(kept)
    }
    in_wheel = {name for name in _files(built.wheel) if ".dist-info/" not in name}
    assert in_wheel == sources | {"hw3gpu/kernels/gpu/tuned.json"}
    assert {"hw3gpu/kernels/gpu/batch_norm.py", "hw3gpu/kernels/cpu/batch_norm.py", "hw3gpu/py.typed"} <= in_wheel
    assert "hw3gpu/kernels/README.md" in in_wheel


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_metadata_names_the_licence_by_spdx(built: Built) -> None:
    metadata = _metadata(built.wheel)
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert not [c for c in metadata.get_all("Classifier") if c.startswith("License")]  # an index refuses both together
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_sdist_holds_what_it_builds_and_what_is_read_about_it(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "SECURITY.md", "LICENSE", "hw3gpu/kernels/README.md"} <= names
    assert not [name for name in names if name.startswith("tests")]  # setuptools adds a part of them by itself


# ---------------------------------------------------------------------------------------------- one version, one list
def test_version_is_the_same_everywhere(built: Built) -> None:
    places = {
        "CITATION.cff": r"^version: (\S+)$",
        "integrations/conda/recipe.yaml": r'^  version: "(\S+)"$',
        "CHANGELOG.md": r"^## (\d\S*) - \d{4}-\d\d-\d\d$",  # the newest release
    }
    found = {name: re.search(pattern, (ROOT / name).read_text(), re.MULTILINE) for name, pattern in places.items()}
    versions = {name: match and match[1] for name, match in found.items()} | {"the wheel": _metadata(built.wheel)["Version"]}
    assert versions == dict.fromkeys(versions, hw3gpu.__version__)


def test_changelog_has_a_place_for_what_comes_next() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", hw3gpu.__version__]


def test_conda_recipe_asks_for_what_the_wheel_asks_for(built: Built) -> None:
    renamed = {"torch": "pytorch"}
    metadata = _metadata(built.wheel)
    required = [text.partition(";") for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    wanted = {(renamed.get(name, name), least) for name, _, least in (text.partition(">=") for text, *_ in required)}
    recipe = (ROOT / "integrations" / "conda" / "recipe.yaml").read_text()
    run = recipe.partition("\n  run:\n")[2].partition("\ntests:")[0]
    listed = set(re.findall(r"^ +- (\w+) >=(\S+)$", run, re.MULTILINE)) - {("python", "${{")}
    assert listed == {(name.strip(), least.strip()) for name, least in wanted}
    assert "- if: linux\n      then:\n        - __linux\n        - triton" in run  # the one with a marker
    assert [name.partition(">=")[0] for name, _, marker in required if marker] == ["triton"]


def test_wheel_of_the_sdist_is_the_same(built: Built) -> None:
    assert _files(built.wheel_of_sdist) == _files(built.wheel)


def test_installed_package_is_imported_from_another_folder(clean: Path, tmp_path: Path) -> None:
    code = (
        "import hw3gpu, hw3gpu.kernels.cpu.batch_norm as kernel, numpy, pathlib;"
        "print(pathlib.Path(hw3gpu.__file__).parents[1]); print(pathlib.Path(kernel.__file__).parents[3]);"
        "print(hw3gpu.softmax(numpy.zeros((1, 4), 'float32')).tolist())"
    )
    package, kernel, probabilities = _run(clean / "python", "-c", code, cwd=tmp_path).splitlines()
    assert package == kernel
    assert Path(package).is_relative_to(clean.parent)
    assert probabilities == "[[0.25, 0.25, 0.25, 0.25]]"


def test_no_top_level_kernels_can_be_imported(clean: Path, tmp_path: Path) -> None:
    code = "import importlib.util as util; print(util.find_spec('hw3gpu') is not None, util.find_spec('kernels'))"
    assert _run(clean / "python", "-c", code, cwd=tmp_path).split() == ["True", "None"]


def test_installed_command_verifies(clean: Path, tmp_path: Path) -> None:
    command = ("verify", "--json", "--kernels", "cpu", "--only", "S4", "--dtypes", "float32")
    verdict = json.loads(_run(clean / "hw3gpu", *command, cwd=tmp_path))
    assert verdict["passed"]
    assert {check["operation"] for check in verdict["checks"]} == {"softmax, softmax_backward"}
