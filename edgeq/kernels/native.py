"""Machine code of kernels: made once by Numba, kept as an object file, loaded by LLVM alone.

Numba's own cache brings back all that a compiler may ask of a function, which takes ten times as long as to
load its code. A kernel is only called. Its object file has one function (words, unit) for that; the words are
the kernel's arguments, 64 bits each, flattened as Numba passes them:

    array     0, 0, size, itemsize, address, shape ..., strides ...
    number    itself

What it returns is Numba's status, 0 unless the kernel raised an exception.
"""

import ctypes
from array import array
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python

WORD = 8
I8P, I64 = ir.IntType(8).as_pointer(), ir.IntType(64)
TYPES = {"i64": I64, "float": ir.FloatType(), **{f"i{n}": ir.IntType(n) for n in (1, 8, 32)}}
NAME = "edgeq_kernel"
LOADED: list[llvm.ExecutionEngine] = []


def words(args: tuple) -> array:
    """A call's arguments."""
    out = array("q")
    for arg in args:
        if isinstance(arg, np.ndarray):
            address = arg.__array_interface__["data"][0]
            out.extend((0, 0, arg.size, arg.itemsize, address, *arg.shape, *arg.strides))
        elif isinstance(arg, np.float32):
            out.append(int(arg.view(np.int32)))
        else:
            out.append(int(arg))
    return out


def emit(compiled: Any) -> bytes:
    """Object file of a function that Numba has compiled."""
    made, context = compiled.fndesc, cpu_target.target_context
    module = llvm.parse_assembly(compiled.library.get_llvm_str())
    kind = context.call_conv.get_function_type(made.restype, made.argtypes)
    module.link_in(llvm.parse_assembly(_caller(kind, made.llvm_func_name)))
    return context.codegen()._tm.emit_object(module)


def _caller(kind: ir.FunctionType, callee_name: str) -> str:
    """LLVM IR of the function (words, unit) that calls a function of Numba's."""
    module = ir.Module()
    module.triple = llvm.get_process_triple()
    caller = ir.Function(module, ir.FunctionType(ir.IntType(32), [I8P, I64]), NAME)
    callee = ir.Function(module, kind, callee_name)
    builder = ir.IRBuilder(caller.append_basic_block())
    # where a kernel returns a value, and where it puts an exception: they have neither
    arguments = [builder.bitcast(builder.alloca(I64), kind.args[0]), builder.alloca(kind.args[1].pointee)]
    for i, wanted in enumerate(kind.args[2:]):
        stored = I64 if isinstance(wanted, ir.PointerType) else wanted
        place = builder.bitcast(builder.gep(caller.args[0], [I64(WORD * i)]), stored.as_pointer())
        value = builder.load(place)
        arguments.append(builder.inttoptr(value, wanted) if stored is not wanted else value)
    builder.ret(builder.call(callee, arguments))
    return str(module)


@cache
def _target() -> llvm.Target:
    """This machine, once all that kernels call is known to LLVM."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for helper, address in _nrt_python.c_helpers.items():  # what kernels that allocate call
        llvm.add_symbol(helper if helper.startswith("_") else f"NRT_{helper}", address)
    return llvm.Target.from_default_triple()


class Code:
    """A loaded object file, to be called with (address of words, 0). It stays: a thread may be in it.

    Attributes
    ----------
    address : of its function.
    """

    def __init__(self, file: bytes) -> None:
        # An engine of its own: to load more into one, LLVM makes pages writable for a moment in which another
        # thread may run what is in them.
        engine = llvm.create_mcjit_compiler(
            llvm.parse_assembly(""), _target().create_target_machine(jit=True)
        )
        engine.add_object_file(llvm.ObjectFileRef.from_data(file))
        engine.finalize_object()
        LOADED.append(engine)
        self.address: int = engine.get_function_address(NAME)
        self.call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)(self.address)
