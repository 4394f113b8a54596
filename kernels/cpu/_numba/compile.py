"""How the CPU kernels are compiled, and where the compiled code is cached.

`kernel` compiles a function that a launcher calls: it runs without the GIL and is cached on disk. `inline` compiles a helper
into the kernels that call it; `overload` chooses a helper by the types of its arguments. Numba's own cache looks only at the
file of the function itself, so a cached kernel would survive a change of its helpers. Here the name of a cache entry has a hash
of the kernel's file and of all files of `kernels/cpu` that it imports: a change compiles again what depends on it, and nothing
else. Where the folder cannot be written kernels are compiled in every process; it is never an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba.extending import overload as numba_overload

from .internals import (
    CacheImpl,
    CacheLocator,
    FunctionCache,
    HelperCompiler,
    HelperDispatcher,
    KernelCompiler,
    KernelDispatcher,
    cached_in,
    config,
    processor,
)

# `contract` allows fused multiply-add. Only the few helpers made with `reduction` may reorder sums, and none has `nnan` or
# `ninf`, since inputs may have NaN and infinities.
_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "fastmath": {"contract"}}
# A helper is never called from Python: compiling the wrapper for that would double its time.
_HELPER = {**_OPTIONS, "no_cpython_wrapper": True}
_CHOSEN = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_INLINE = {**_HELPER, "forceinline": True}


# What a helper returns that is no array, as its annotation says.
_NO_ARRAY = frozenset(("None", "bool", "int", "float", "Lanes", "tuple"))


def _counting(function: Callable[..., Any]) -> dict[str, bool]:
    """The option by which a helper that returns no array counts no references: its caller holds them.

    Each count is an atomic operation, which waits for all stores before it, in the middle of a loop. Such a helper may make
    views without references (`views.py`), but it must not take an array from a helper that counts: that one would be kept for
    ever. `tests/guarded_calls.py` looks for it.
    """
    returned = re.findall(r"\w+", str(function.__annotations__.get("return", "Any")))
    return {"_nrt": not _NO_ARRAY.issuperset(returned)}


def _helper(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    options = {**options, **_counting(function), "nopython": True}
    return HelperDispatcher(function, targetoptions=options, pipeline_class=HelperCompiler)


def inline(function: Callable[..., Any]) -> Any:
    """Compile a helper into whatever calls it."""
    return _helper(function, _INLINE)


def outline(function: Callable[..., Any]) -> Any:
    """Compile a helper that stays a function of its own: for rarely executed code, so that kernels compile faster."""
    return _helper(function, _HELPER)


def exact(function: Callable[..., Any]) -> Any:
    """As `inline`, with no fused operations: each operation is rounded as written, for numbers in two parts."""
    return _helper(function, {**_INLINE, "fastmath": set()})


def reduction(function: Callable[..., Any]) -> Any:
    """As `inline`, and the compiler may reorder the additions of `function`; their order is then fixed in the compiled code.

    `function` itself must contain no subtraction: (x - high) - low could become x - (high + low), and low would be lost. It
    takes differences from an `inline` helper, whose operations keep their own flags.
    """
    return _helper(function, {**_INLINE, "fastmath": {"contract", "reassoc", "nsz"}})


def overload(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """As Numba's `overload`, and what it chooses is a helper: compiled into the kernels that call it, with their options."""
    options = {**_CHOSEN, **_counting(function)}
    return numba_overload(function, jit_options={**options, "pipeline_class": HelperCompiler})


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call with new argument types; runs without the GIL, cached on disk where that is possible.

    Functions of other packages are not cached: the hash knows the sources of this one only.
    """
    dispatcher = KernelDispatcher(function, targetoptions={**_OPTIONS, "nopython": True}, pipeline_class=KernelCompiler)
    if function.__module__.startswith(f"{_PACKAGE}.") and cache_folder() is not None:
        cached_in(_KernelCache(function), dispatcher)
    return dispatcher


@functools.cache
def cache_folder() -> str | None:
    """Where compiled kernels are kept: under NUMBA_CACHE_DIR, else the user's cache folder, and there for this user alone.

    None if it cannot be written, and if others may write to it, with a warning: Numba's cache files are pickles, which run
    code where they are read.
    """
    try:
        if config.CACHE_DIR:
            base = Path(config.CACHE_DIR)
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hw3gpu"
        folder = base / "kernels-cpu"
        for made in (base, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if _others_may_write(folder):
            warnings.warn(
                f"{folder} may be written by others, so compiled CPU kernels are not kept there: chmod 700, or another "
                "NUMBA_CACHE_DIR",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return str(folder)


def _others_may_write(folder: Path) -> bool:
    """True where another user than this one and root owns the folder, or may write to it."""
    if not hasattr(os, "geteuid"):  # Windows: the user's own folder, whose rights are its parent's
        return False
    status = folder.stat()
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


# `hw3gpu.kernels.cpu`
_PACKAGE = __package__.rpartition(".")[0]
# `from .simd import …`, `from .._batch_norm import lines, planes`, on one line or in brackets
_IMPORT = re.compile(r"^ *from (\.+)([\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)


@functools.cache
def source_hash(module: str) -> str:
    """A hash of all sources of the kernels of a module of `kernels/cpu`; its name counts from there: `_numba.simd`.

    The sources are the module, what it imports of `kernels/cpu` at any depth, and the package's name, by which compiled code
    finds its types.
    """
    root = Path(__file__).parents[1]
    # a kernel may run on OpenMP's threads and at addresses, whoever compiles it
    pending, sources = [module, "_numba.openmp", "_numba.by_address"], {}
    while pending:
        name = pending.pop()
        if name not in sources:
            sources[name] = _file(root, name).read_text()
            pending += _imported(root, name, sources[name])
    return hashlib.sha256(repr((_PACKAGE, sorted(sources.items()))).encode()).hexdigest()


def _file(root: Path, module: str) -> Path:
    return root.joinpath(*module.split(".")).with_suffix(".py")


def _imported(root: Path, module: str, source: str) -> Iterator[str]:
    """The modules of `kernels/cpu` that a module with this source imports."""
    for dots, base, names in _IMPORT.findall(source):
        found = ".".join([*module.split(".")[: -len(dots)], *filter(None, base.split("."))])
        beside = [f"{found}.{name}".lstrip(".") for name in re.findall(r"\w+", names)]
        yield from (name for name in [found, *beside] if name and _file(root, name).is_file())


class _Locator(CacheLocator):
    """Gives Numba's cache the folder above, and names with the hash of the sources, so that no entry can be stale."""

    def __init__(self, function: Callable[..., Any], source: str) -> None:
        self._py_file = source
        # the module of the kernel: for a `team_of` a kernel, py_file would be `openmp.py`
        self._module = function.__module__.removeprefix(f"{_PACKAGE}.")

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator:
        return cls(py_func, py_file)

    def get_cache_path(self) -> str | None:
        return cache_folder()

    def get_source_stamp(self) -> str:
        return source_hash(self._module)

    def get_disambiguator(self) -> str:
        return f"{self._module}-{source_hash(self._module)[:16]}"


class _KernelCacheImpl(CacheImpl):
    _locator_classes = (_Locator,)


class _KernelCache(FunctionCache):
    _impl_class = _KernelCacheImpl

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, processor(codegen)  # the name of the file has the hash of the code, closures included

    @contextlib.contextmanager
    def one_process_at_a_time(self, sig: Any) -> Iterator[None]:
        """While a process is inside, others that want to compile the same wait, and then read what it has cached.

        They do not wait for more than a minute, nor where files cannot be locked: then several compile the same.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ImportError, OSError):
                import fcntl  # not on Windows

                byte = int(hashlib.sha256(f"{self._impl.filename_base} {sig}".encode()).hexdigest()[:7], 16)
                file = stack.enter_context(open(Path(self.cache_path) / "lock", "ab"))
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                        break
                    except BlockingIOError:
                        time.sleep(0.02)
            yield

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with contextlib.suppress(OSError, EOFError):
            return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)
