"""What the CPU kernels use of Numba beyond its documented interface: all of it is here, because any release may change it.

`numba.extending`, `numba.types`, the options of `numba.njit` and `llvmlite.ir` are documented and imported where they are used.
`tests/test_internals.py` fails with the name of what a release has moved.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numba
from numba import typeof, types

KNOWN = "0.61 to 0.68"

try:
    from numba.core import cgutils, config
    from numba.core.caching import FunctionCache, _CacheLocator
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler, Flags
    from numba.core.datamodel import models, register_default
    from numba.core.dispatcher import Dispatcher
    from numba.core.registry import CPUDispatcher
    from numba.core.typing.templates import AbstractTemplate, infer_global, signature
    from numba.np.arrayobj import load_item, make_array, store_item

    CacheLocator: Any = _CacheLocator
    CacheImpl: Any = FunctionCache._impl_class
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"the CPU kernels were made for Numba {KNOWN}, and Numba {numba.__version__} lacks what they use of it: {error}"
    ) from error

__all__ = [
    "AbstractTemplate",
    "CacheImpl",
    "CacheLocator",
    "Dispatcher",
    "FunctionCache",
    "HelperCompiler",
    "HelperDispatcher",
    "KernelCompiler",
    "KernelDispatcher",
    "cached_in",
    "call",
    "cgutils",
    "compiled_for",
    "config",
    "infer_global",
    "load_item",
    "make_array",
    "models",
    "processor",
    "raise_error",
    "register_default",
    "signature",
    "store_item",
    "unowned",
]


def processor(codegen: Any) -> tuple[str, str, str]:
    """(triple, name, features) of the processor that `codegen` compiles for: with the source, what decides the code."""
    return codegen.magic_tuple()


def cached_in(cache: Any, dispatcher: Any) -> Any:
    """The dispatcher, with `cache` as the cache of its compiled code."""
    dispatcher._cache = cache
    return dispatcher


def compiled_for(typing_context: Any, kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """The compile result of `kernel`, a dispatcher's type, for arguments of these types."""
    return kernel.dispatcher.get_compile_result(kernel.get_call_type(typing_context, arguments, {}))


def call(context: Any, builder: Any, compiled: Any, arguments: Any) -> Any:
    """Calls a result of `compiled_for`; returns the bit that says whether it raised an error."""
    context.add_linking_libs([compiled.library])
    status, _ = context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, arguments)
    return status.is_error


def unowned(array: Any) -> Any:
    """The array without reference counting: its user holds a reference."""
    array.meminfo, array.parent = (cgutils.get_null_value(of.type) for of in (array.meminfo, array.parent))
    return array._getvalue()


def raise_error(context: Any, builder: Any, error: type[Exception], message: str) -> None:
    """Returns from the function that is being built with a Python error."""
    context.call_conv.return_user_exc(builder, error, (message,))


class _Flags(Flags):
    """Flags with a fast comparison and a hash. Numba's own have one hash for all, and it compares 30 flags for each call."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, _Flags) else super().__eq__(other)

    def __hash__(self) -> int:
        return hash(frozenset((name, str(value)) for name, value in self._values.items()))


class KernelCompiler(Compiler):
    """Numba's compiler with the flags above."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.flags = _Flags(self.state.flags)


class _NoEnvironment:
    """Replaces the execution engine: a helper has no environment of its own, but that of the kernel it is compiled into."""

    @staticmethod
    def set_env(name: str, environment: Any) -> None:
        pass


class _HelperLibrary(JITCodeLibrary):
    """The unoptimised code of a helper, never executed: a kernel links it in, and LLVM optimises the kernel as a whole."""

    codegen = _NoEnvironment

    def finalize(self) -> None:
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0


class HelperCompiler(KernelCompiler):
    """The compiler of helpers, which only kernels call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.library = _HelperLibrary(self.state.targetctx.codegen(), "helper")


def _of_any_strides(kind: Any) -> Any:
    """The type of an argument of a kernel, an array or a tuple of arrays, for all strides; other types as they are."""
    if isinstance(kind, types.Array):
        return kind.copy(layout="A" if kind.ndim == 3 else kind.layout, readonly=False)
    return types.Tuple([_of_any_strides(of) for of in kind]) if isinstance(kind, types.Tuple | types.UniTuple) else kind


class HelperDispatcher(CPUDispatcher):
    """A helper: compiled once for a number, not for each constant in a call, which LLVM sees when it inlines."""

    def get_call_template(self, args: Any, kws: Any) -> Any:
        return super().get_call_template(
            tuple(types.unliteral(of) for of in args), {name: types.unliteral(of) for name, of in kws.items()}
        )


class KernelDispatcher(HelperDispatcher):
    """A kernel: code for three-dimensional arrays serves all strides, and code for writable arrays serves read-only ones.

    Called by another kernel it is a helper: compiled into that one, with no code of its own.
    """

    @functools.cached_property
    def _helper(self) -> HelperDispatcher:
        options = self.targetoptions | {"no_cpython_wrapper": True}
        return HelperDispatcher(self.py_func, targetoptions=options, pipeline_class=HelperCompiler)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        return self._helper.get_call_template(args, kws)

    def get_overload(self, sig: Any) -> Any:
        return self._helper.get_overload(sig)

    def get_compile_result(self, sig: Any) -> Any:
        return self._helper.get_compile_result(sig)

    def typeof_pyval(self, val: Any) -> Any:
        return _of_any_strides(super().typeof_pyval(val))

    def compile(self, sig: Any) -> Any:
        # without a cache there is no other process to wait for
        with getattr(self._cache, "one_process_at_a_time", contextlib.nullcontext)(sig):
            return super().compile(sig)

    def _compile_for_args(self, *args: Any, **kws: Any) -> Any:
        compiled = super()._compile_for_args(*args, **kws)
        found = tuple(typeof(value) for value in args)
        if found not in self.overloads:
            self._insert([kind._code for kind in found], compiled)  # so that the next call finds it at once
        return compiled
