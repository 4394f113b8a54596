"""What the library uses of Triton beyond its documented interface: all of it is here, because any release may change it.

`tests/test_internals.py` fails with the name of what a release has moved.
"""

from __future__ import annotations

from typing import Any

import triton

KNOWN = "3.6 to 3.9"
_RUNTIME, _DRIVER = triton.knobs.runtime, triton.runtime.driver

BINDS = not _RUNTIME.interpret  # the interpreter compiles nothing that could be kept


def device() -> int:
    """The current device."""
    return _DRIVER.active.get_current_device()


def stream() -> int:
    """The current stream of the current device."""
    active = _DRIVER.active
    return active.get_current_stream(active.get_current_device())


def hooked() -> bool:
    """True where a profiler has set hooks on launches."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def run(compiled: Any, programs: int, stream: int, args: list[Any]) -> None:
    """Launches a compiled kernel as `JITFunction.run` does; args include the constants.

    Unless `hooked`, metadata and hooks may be None.
    """
    metadata = compiled.launch_metadata((programs,), stream, *args)
    hooks = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, metadata, *hooks, *args)
