"""Program: kernel calls that are recorded once and then made again without Python between them.

A decoded token is some hundred kernels of a few microseconds, and to call one from Python takes as long. For
the next token of the same sequence a model makes the same calls on the same arrays; all that changes is the
input, which is copied in, and the position, which the kernels read from memory.

A recorded call is two addresses: its arguments, flattened to 64-bit words as Numba passes them,

    array     0, 0, size, itemsize, address, shape ..., strides ...
    number    itself

and a trampoline, a few instructions that load them and call the kernel; one for each kind of arguments.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba.core.codegen import CodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from . import jit
from .jit import Entry, kernel
from .pool import I8P, I64, call_unit

WORD = 8


@kernel("void(i8[:, ::1])")
def replay(calls):
    """Make the calls (trampoline, words), one after the other."""
    for i in range(len(calls)):
        call_unit(calls[i, 0], calls[i, 1], 0)


class Program:
    """What `compute` does to an array x; computes it once while recording.

    All results that `compute` hands on must be made by kernels: what NumPy computes is not recorded.

    Attributes
    ----------
    out : the result, overwritten by every call.
    """

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> None:
        self.x = x.copy()
        with jit.recording() as self.calls:
            self.out = compute(self.x)
        self.words = [words(entry, args) for entry, args in self.calls]
        addresses = [(trampoline(e), w.ctypes.data) for (e, _), w in zip(self.calls, self.words, strict=True)]
        self.table = np.array(addresses, np.int64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The same for another x of that shape."""
        self.x[:] = x
        replay(self.table)
        return self.out


def words(entry: Entry, args: tuple) -> np.ndarray:
    """A call's kernel and arguments as 64-bit words."""
    out = [entry.address]
    for arg in args:
        if isinstance(arg, np.ndarray):
            out += [0, 0, arg.size, arg.itemsize, arg.ctypes.data, *arg.shape, *arg.strides]
        elif isinstance(arg, np.float32):
            out.append(int(arg.view(np.int32)))
        else:
            out.append(int(arg))
    return np.array(out, np.int64)


def trampoline(entry: Entry) -> int:
    """Address of a function (words, unit) that calls the kernel at words[0] with the other words."""
    call = cpu_target.target_context.call_conv.get_function_type(*entry.signature)
    kinds = tuple("i64" if isinstance(t, ir.PointerType) else str(t) for t in call.args[2:])
    library, name = make_trampoline(kinds)
    return library.get_pointer_to_function(name)


@cache
def make_trampoline(kinds: tuple[str, ...]) -> tuple[CodeLibrary, str]:
    """The function for arguments of these LLVM types, as its name in a library; the code lives as long as
    that.
    """
    name = f"edgeq.trampoline.{'.'.join(kinds)}"
    library = cpu_target.target_context.codegen().create_library(name)
    module = library.create_ir_module(name)
    types = {"i64": I64, "float": ir.FloatType(), **{f"i{n}": ir.IntType(n) for n in (1, 8, 32)}}
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I8P, I64]), name)
    builder = ir.IRBuilder(function.append_basic_block())

    def load(i, kind):
        place = builder.gep(function.args[0], [I64(WORD * i)])
        return builder.load(builder.bitcast(place, kind.as_pointer()))

    # where a kernel returns a value, and where it puts an exception: they have neither
    nowhere = [builder.alloca(I8P), builder.alloca(I8P)]
    arguments = [load(i, types[kind]) for i, kind in enumerate(kinds, 1)]
    signature = ir.FunctionType(ir.IntType(32), [a.type for a in (*nowhere, *arguments)])
    callee = builder.inttoptr(load(0, I64), signature.as_pointer())
    builder.call(callee, [*nowhere, *arguments])
    builder.ret_void()
    with global_compiler_lock:
        library.add_ir_module(module)
        library.finalize()
    return library, name
