"""What the CPU kernels use of Numba beyond its documented interface: all of it stands here, since any release may move it.

`numba.extending`, `numba.types`, the options of `numba.njit` and `llvmlite.ir` are documented and imported where they are used.
`tests/test_internals.py` names each thing that a release has moved.
"""

from __future__ import annotations

from typing import Any

import numba

KNOWN = "0.61 to 0.68"

try:
    from numba.core import cgutils, config
    from numba.core.caching import FunctionCache, _CacheLocator
    from numba.core.datamodel import models, register_default
    from numba.core.dispatcher import Dispatcher
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
]


def processor(codegen: Any) -> tuple[str, str, str]:
    """(triple, name, features) of the processor that `codegen` makes code for: all that the code depends on but its source."""
    return codegen.magic_tuple()


def cached_in(cache: Any, dispatcher: Any) -> Any:
    """The dispatcher, whose compiled code is to be kept by `cache`."""
    dispatcher._cache = cache
    return dispatcher


def compiled_for(typing_context: Any, kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """What Numba compiles of `kernel`, the type of a dispatcher, for arguments of these types."""
    return kernel.dispatcher.get_compile_result(kernel.get_call_type(typing_context, arguments, {}))


def call(context: Any, builder: Any, compiled: Any, arguments: Any) -> Any:
    """Calls what `compiled_for` gave; whether it raised an error, as a bit."""
    context.add_linking_libs([compiled.library])
    status, _ = context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, arguments)
    return status.is_error


def raise_error(context: Any, builder: Any, error: type[Exception], message: str) -> None:
    """Leaves the function that is being built with a Python error."""
    context.call_conv.return_user_exc(builder, error, (message,))
