"""Runs a kernel on the threads of torch's OpenMP runtime, without Python code between its pieces.

After a parallel operation of torch its OpenMP threads wait for the next one in a busy loop, for milliseconds: other threads
would share the processors with them, and would first have to be woken. So a large call enters OpenMP as torch's operations do,
through `GOMP_parallel(function, data, threads, flags)`, which the runtimes of GNU, LLVM and Intel all have.

`team_of(kernel)` is a compiled function. It packs the arguments into a structure on its stack and passes OpenMP a second
compiled function, which takes pieces by an atomic counter until none is left.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import kernel as compiled
from .internals import call, cgutils, compiled_for, make_array, raise_error, unowned

_INT, _FLAG = ir.IntType(64), ir.IntType(32)


@functools.cache
def _entry() -> int:
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


_is_forked = False


def openmp() -> int:
    """The address of `GOMP_parallel` in the runtime that torch has loaded, or 0 where it cannot be used.

    It cannot be used in a forked child: the runtime would wait for threads that only the parent has.
    """
    return 0 if _is_forked or "torch" not in sys.modules else _entry()


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def team_of(kernel: Any) -> Any:
    """`kernel(first, last, *args)` as f(openmp, threads, piece, end, pieces, blocks, *args).

    A team does the pieces from `piece` to `end` of the `pieces` that range(blocks) is cut into.
    """

    def team(entry, threads, piece, end, pieces, blocks, *args) -> None:
        _share(kernel, entry, threads, piece, end, pieces, blocks, args)

    original = kernel.py_func
    team.__module__, team.__name__ = original.__module__, f"{original.__name__}_team"
    team.__qualname__ = f"{original.__qualname__}_team"
    return compiled(team)


@intrinsic
def _share(
    typingctx: Any, kernel: Any, entry: Any, threads: Any, piece: Any, end: Any, pieces: Any, blocks: Any, args: Any
) -> Any:
    """Lets `threads` OpenMP threads call those pieces of range(blocks); MemoryError where one of them found no memory."""
    arguments = types.intp, types.intp, *args
    called = compiled_for(typingctx, kernel, arguments)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, entry, threads, piece, end, pieces, blocks, packed = values
        # the data: next piece, where they end, pieces, blocks, whether one failed, the kernel's arguments
        head = piece, end, pieces, blocks, ir.Constant(_FLAG, 0)
        given = (
            _borrowed(context, builder, *pair)
            for pair in zip(args, cgutils.unpack_tuple(builder, packed, len(args)), strict=True)
        )
        data = cgutils.pack_struct(builder, [*head, *given])
        frame = cgutils.alloca_once_value(builder, data)
        work = _worker(context, builder.module, called, arguments, data.type)
        start = ir.FunctionType(ir.VoidType(), [work.type, frame.type, _FLAG, _FLAG])
        start = builder.inttoptr(entry, start.as_pointer())
        builder.call(start, [work, frame, builder.trunc(threads, _FLAG), ir.Constant(_FLAG, 0)])
        failed = builder.load(cgutils.gep_inbounds(builder, frame, 0, 4))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, failed)):
            raise_error(context, builder, MemoryError, "a kernel found no memory")
        return context.get_dummy_value()

    return types.void(kernel, *[types.intp] * 6, args), codegen


def _borrowed(context: Any, builder: Any, of: Any, value: Any) -> Any:
    """An array without reference counting, since all threads would count on one cache line. The caller holds references."""
    if not isinstance(of, types.Array):
        return value
    return unowned(make_array(of)(context, builder, value))


def _worker(context: Any, module: Any, called: Any, arguments: Any, layout: Any) -> Any:
    """The function of a thread, void f(data*): takes pieces and calls the kernel for each."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [layout.as_pointer()]), module.get_unique_name("pieces"))
    function.linkage = "internal"
    frame = function.args[0]
    builder = ir.IRBuilder(function.append_basic_block())

    def member(i: int) -> Any:
        return builder.load(cgutils.gep_inbounds(builder, frame, 0, i))

    end, pieces, blocks, given = member(1), member(2), member(3), [member(5 + i) for i in range(len(arguments) - 2)]
    take, do, done = (function.append_basic_block(name) for name in ("take", "do", "done"))
    builder.branch(take)
    builder.position_at_end(take)
    one = ir.Constant(_INT, 1)
    piece = builder.atomic_rmw("add", cgutils.gep_inbounds(builder, frame, 0, 0), one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", piece, end), do, done)
    builder.position_at_end(do)
    first, last = (builder.sdiv(builder.mul(blocks, p), pieces) for p in (piece, builder.add(piece, one)))
    with cgutils.if_unlikely(builder, call(context, builder, called, (first, last, *given))):
        builder.store(ir.Constant(_FLAG, 1), cgutils.gep_inbounds(builder, frame, 0, 4))
    builder.branch(take)
    builder.position_at_end(done)
    builder.ret_void()
    return function
