"""`hw3gpu info`: versions, devices, and which kernels run for which arrays, and why."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

import numpy as np

from .. import Explanation, __version__, explain
from .._core import arrays as _arrays
from .._core import dispatch, pool
from .arrays import cupy_refusal
from .standard_calls import standard_calls

PACKAGES = ("numpy", "scipy", "numba", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "scikit-learn", "matplotlib")
SETTINGS = ("HW3GPU_BACKEND", "HW3GPU_CPU_CACHE_MB", "HW3GPU_NUM_THREADS", "TRITON_INTERPRET")


def collect() -> dict[str, Any]:
    """Everything that `hw3gpu info` prints, ready for JSON."""
    return {
        "versions": {"hw3gpu": __version__, "python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "devices": _devices(),
        "settings": {name: os.environ.get(name) for name in SETTINGS},
        "cpu_kernels": _cpu_kernels(),
        "kernels": _kernels(),
    }


def _cpu_kernels() -> dict[str, Any]:
    """Where compiled kernels are kept (None: nowhere, they are compiled anew), threads, and the bound of recycled outputs."""
    dispatch.check_threads()
    cache, threads = dispatch.compile_cache.cache_folder(), dispatch.threads.num_threads()
    return {"cache": cache, "threads": threads, "recycled_MB": pool.limit() // 2**20}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": os.cpu_count()}
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        gpus.append({"device": f"cuda:{i}", "name": properties.name, "capability": capability, "memory_GiB": memory})
    return [cpu, *gpus]


def _kernels() -> list[dict[str, str | None]]:
    """For each kind of array: the kernels that a call would run, or None, and the reason."""
    import torch

    found = [_choice("NumPy array", np.zeros(1)), _choice("torch CPU tensor", torch.zeros(1))]
    if torch.cuda.is_available():
        found.append(_choice("torch CUDA tensor", torch.zeros(1, device="cuda")))
    else:
        found.append({"arrays": "torch CUDA tensor", "kernels": None, "why": "torch finds no CUDA device"})
    refusal = cupy_refusal()
    if refusal:
        found.append({"arrays": "CuPy array", "kernels": None, "why": refusal})
    else:
        import cupy

        found.append(_choice("CuPy array", cupy.zeros(1)))
    return found


def _choice(arrays: str, example: Any) -> dict[str, str | None]:
    where = "the host" if _arrays.on_host(example) else "a GPU"
    try:
        which = dispatch.backend(example)
    except (dispatch.BackendError, ValueError) as error:
        return {"arrays": arrays, "kernels": None, "why": str(error)}
    why = f"the array lives on {where}"
    if dispatch.requested_backend() != "auto":
        why = f"HW3GPU_BACKEND={dispatch.requested_backend()} asks for them"
    elif which == "gpu":
        refusal = dispatch.gpu_refusal("cuda")
        if refusal:
            return {"arrays": arrays, "kernels": None, "why": f"{why}, but {refusal}"}
    if which == "gpu" and os.environ.get("TRITON_INTERPRET") == "1":
        why += "; TRITON_INTERPRET=1 interprets them"
    return {"arrays": arrays, "kernels": {"cpu": "Numba (cpu)", "gpu": "Triton (gpu)"}[which], "why": why}


def explanations() -> dict[str, Explanation | str]:
    """What a standard call of each public function does, by name; or why it cannot run here."""
    found: dict[str, Explanation | str] = {}
    for call in standard_calls():
        try:
            explained = explain(call.function, *call.args, **call.kwargs)
            found[explained.function] = explained
        except dispatch.BackendError as error:
            found[f"{call.function.__module__}.{call.function.__name__}"] = str(error)
    return found


def main(as_json: bool, explained: bool = False) -> int:
    """Print what `collect` found, as tables or as JSON; status 2 for a setting that has no meaning.

    explained: also `explanations`.
    """
    try:
        found = collect()
    except ValueError as error:
        print(f"hw3gpu info: {error}", file=sys.stderr)
        return 2
    if as_json:
        if explained:
            found["explain"] = {
                name: of if isinstance(of, str) else dataclasses.asdict(of) for name, of in explanations().items()
            }
        print(json.dumps(found, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = Table("package", "version", title="Versions")
    for package, version in found["versions"].items():
        versions.add_row(package, version or "[dim]not installed[/]")
    console.print(versions)
    devices = Table("device", "what", title="Devices")
    for device in found["devices"]:
        devices.add_row(device["device"], ", ".join(f"{k} {v}" for k, v in device.items() if k != "device"))
    console.print(devices)
    cpu = Table("kernels on the CPU", "what")
    cpu.add_row("compiled kernels", found["cpu_kernels"]["cache"] or "kept nowhere: no cache folder can be written")
    cpu.add_row("threads", str(found["cpu_kernels"]["threads"]))
    cpu.add_row("recycled outputs", f"at most {found['cpu_kernels']['recycled_MB']} MB idle")
    console.print(cpu)
    kernels = Table("arrays", "kernels", "why", title="Which kernels run")
    for choice in found["kernels"]:
        kernels.add_row(choice["arrays"], choice["kernels"] or "[red]none[/]", choice["why"])
    console.print(kernels)
    if explained:
        print("What a standard call of each function does")
        for name, of in explanations().items():
            print(f"{name}: {of}" if isinstance(of, str) else of)
    return 0
