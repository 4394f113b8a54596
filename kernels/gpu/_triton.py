"""What the library uses of Triton beyond its documented interface: all of it stands here, since any release may move it.

`tests/test_internals.py` names each thing that a release has moved.
"""

from __future__ import annotations

from typing import Any

import triton

KNOWN = "3.6 to 3.9"
_RUNTIME, _DRIVER = triton.knobs.runtime, triton.runtime.driver

BINDS = not _RUNTIME.interpret  # what the interpreter runs is not compiled


def device() -> int:
    """The current device."""
    return _DRIVER.active.get_current_device()


def stream() -> int:
    """The current stream of the current device."""
    active = _DRIVER.active
    return active.get_current_stream(active.get_current_device())


def hooked() -> bool:
    """Whether somebody, a profiler, wants to be told of launches."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def run(compiled: Any, programs: int, stream: int, args: list[Any]) -> None:
    """Launches a compiled kernel as `JITFunction.run` does once it has found it, constants among the arguments.

    Where nobody is `hooked`, None may stand for metadata and hooks.
    """
    metadata = compiled.launch_metadata((programs,), stream, *args)
    hooks = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, metadata, *hooks, *args)
