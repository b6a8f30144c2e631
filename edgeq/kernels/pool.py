"""A pool of threads for kernels: work is taken in small units by whichever thread is running.

Numba's own parallel loops give each thread a fixed share and wait until every thread has arrived. On a
machine with other work a thread may not be running for milliseconds, and a token has a hundred and more
loops: one busy core then takes nine tenths of the speed. Here the calling thread takes units like the others
and waits only for units that somebody has begun, so that a thread that does not run is not missed.

    one 64-bit word says it all:    units, 32 bits | next unit, 32 bits

A thread takes a unit by adding 1 to the word. What comes back tells it whether the unit exists, and a unit
that exists keeps its job alive until it is done. So there is nothing to lock, and a thread that comes late
finds nothing left.

Between jobs the threads spin for a moment, then yield, and after a call of the model they sleep until the
next. A job that waits long for a unit, longer than the rest of it took, tells that another program has one of
the processors: then one thread fewer takes part for a while.
"""

import atexit
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import kernel

# places in the shared state, a cache line apart
TICKET, DONE, FUNCTION, ARGUMENTS, STOP, BUSY, THREADS, ACTIVE, BACK, PLACES = (
    0,
    8,
    16,
    17,
    24,
    25,
    26,
    27,
    28,
    32,
)
UNIT_BITS = 32
MANY = (1 << UNIT_BITS) - 1
SPINS = 2000  # pauses before a thread gives others its processor, about 0.1 ms
YIELDS = 2000  # times it does so before it sleeps, about 1 ms
LONG = 500_000  # nanoseconds of waiting that another program is to blame for
REST = 16  # times as long as others waited for it, a thread is then left out

I8P, I32, I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
# tells the processor that the thread waits, where there is such an instruction
PAUSES = {"arm": ("llvm.aarch64.hint", [I32(1)]), "x86": ("llvm.x86.sse2.pause", [])}
MACHINES = {"aarch64": "arm", "arm64": "arm", "x86_64": "x86", "amd64": "x86"}


def _place(context, builder, sig, args):
    """Address of state[index]."""
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    return builder.gep(data, [context.cast(builder, args[1], sig.args[1], types.intp)])


@intrinsic
def atomic_add(typing, state, index, value):
    """Add to state[index], and return what was there."""

    def code(context, builder, sig, args):
        return builder.atomic_rmw("add", _place(context, builder, sig, args), args[2], "acq_rel")

    return types.int64(state, index, types.int64), code


@intrinsic
def atomic_load(typing, state, index):
    """state[index], and all that was written before it was stored."""

    def code(context, builder, sig, args):
        return builder.load_atomic(_place(context, builder, sig, args), "acquire", 8)

    return types.int64(state, index), code


@intrinsic
def atomic_store(typing, state, index, value):
    """Set state[index], after all that was written before."""

    def code(context, builder, sig, args):
        builder.store_atomic(args[2], _place(context, builder, sig, args), "release", 8)
        return context.get_dummy_value()

    return types.void(state, index, types.int64), code


def _system_call(name, *values):
    """A function that calls a C function, or one of LLVM's, without a result that matters."""

    @intrinsic
    def call(typing):
        def code(context, builder, sig, args):
            kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)
            return context.get_dummy_value()

        return types.void(), code

    return call


yield_processor = _system_call("sched_yield")
machine = MACHINES.get(platform.machine().lower())
pause = _system_call(PAUSES[machine][0], *PAUSES[machine][1]) if machine else yield_processor
nap = _system_call("usleep", I32(20))


@intrinsic
def clock(typing):
    """Nanoseconds of a clock that only goes forward."""

    def code(context, builder, sig, args):
        moment = cgutils.alloca_once(builder, ir.LiteralStructType([I64, I64]))
        kind = ir.FunctionType(I32, [I32, moment.type])
        read = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(read, [I32(time.CLOCK_MONOTONIC), moment])
        seconds, rest = (builder.extract_value(builder.load(moment), i) for i in range(2))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)

    return types.int64(), code


@intrinsic
def job(typing, body, arguments):
    """Address of a function (data, unit) that calls body(unit, *arguments), and of the data; both live in the
    frame of the calling kernel.
    """
    signature = typing.resolve_function_type(body, (types.intp, *arguments.types), {})

    def code(context, builder, sig, args):
        compiled = body.dispatcher.overloads[signature.args]
        context.active_code_library.add_linking_library(compiled.library)
        data = cgutils.alloca_once_value(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [I8P, I64])
        function = ir.Function(
            builder.module, kind, builder.module.get_unique_name(f"job.{compiled.fndesc.mangled_name}")
        )
        function.linkage = "internal"
        inner = ir.IRBuilder(function.append_basic_block())
        values = inner.load(inner.bitcast(function.args[0], data.type))
        values = [inner.extract_value(values, i) for i in range(len(arguments.types))]
        callee = context.declare_function(builder.module, compiled.fndesc)
        # the bodies raise nothing, so the status that comes back tells nothing
        context.call_conv.call_function(
            inner, callee, signature.return_type, signature.args, [function.args[1], *values]
        )
        inner.ret_void()
        pair = [builder.ptrtoint(function, I64), builder.ptrtoint(data, I64)]
        return context.make_tuple(builder, sig.return_type, pair)

    return types.UniTuple(types.int64, 2)(body, arguments), code


@intrinsic
def call_unit(typing, function, data, unit):
    """Call what `job` made."""

    def code(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I8P, I64]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(args[1], I8P), args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@njit(nogil=True)
def take_units(state):
    """Do units of the present job until none are left."""
    done = 0
    ticket = atomic_add(state, TICKET, 1)
    while ticket & MANY < ticket >> UNIT_BITS:
        call_unit(state[FUNCTION], state[ARGUMENTS], ticket & MANY)
        done += 1
        ticket = atomic_add(state, TICKET, 1)
    if done:
        atomic_add(state, DONE, done)


@njit(nogil=True)
def run(state, units, function_and_data):
    """Call body(unit, *arguments) of a `job` for every unit, on this thread and those of the pool."""
    function, data = function_and_data
    if state[ACTIVE] < state[THREADS] and clock() > state[BACK]:
        state[ACTIVE] += 1
    if units == 1 or state[ACTIVE] == 1:
        for unit in range(units):
            call_unit(function, data, unit)
        return
    start = clock()
    state[FUNCTION], state[ARGUMENTS] = function, data
    atomic_store(state, DONE, 0)
    atomic_store(state, TICKET, units << UNIT_BITS)
    take_units(state)
    if atomic_load(state, DONE) == units:
        return
    alone, waited = clock(), 0
    while atomic_load(state, DONE) < units:
        waited += 1
        if waited < SPINS:
            pause()
        else:  # whoever has the last unit is not running: leave it this processor
            nap()
    now = clock()
    if waited >= SPINS and now - alone > max(LONG, alone - start):
        state[ACTIVE], state[BACK] = max(1, state[ACTIVE] - 1), now + REST * (now - alone)


@kernel("void(i8[::1], i8)")
def work(state, me):
    """What a thread of the pool does: units of every job, until the model's call is over and the next does
    not come.
    """
    idle = 0
    while (idle < SPINS + YIELDS or atomic_load(state, BUSY) != 0) and atomic_load(state, STOP) == 0:
        ticket = atomic_load(state, TICKET)
        if me >= state[ACTIVE]:
            nap()
        elif ticket & MANY < ticket >> UNIT_BITS:
            take_units(state)
            idle = 0
        elif idle < SPINS:
            pause()
        else:
            yield_processor()
        idle += 1


class Pool:
    """The threads of this process, and the state they share with the kernels; started when they are first
    wanted.
    """

    def __init__(self) -> None:
        self.state = np.zeros(PLACES, np.int64)
        self.state[THREADS] = self.state[ACTIVE] = 1
        self.awake: list[threading.Event] = []
        self.threads: list[threading.Thread] = []

    def use(self, threads: int) -> None:
        """Let kernels run on that many threads, this one included, and wake those that sleep."""
        if threads != self.state[THREADS]:
            self.state[THREADS] = self.state[ACTIVE] = threads
        self.state[BUSY] = 1
        while len(self.awake) < threads - 1:
            event = threading.Event()
            self.awake.append(event)
            thread = threading.Thread(target=self._serve, args=(len(self.awake), event), daemon=True)
            self.threads.append(thread)
            thread.start()
        for event in self.awake[: threads - 1]:
            event.set()

    def _serve(self, me: int, awake: threading.Event) -> None:
        while not self.state[STOP]:
            awake.wait()
            awake.clear()
            work(self.state, me)

    def stop(self) -> None:
        """End the threads; a process that ends must not leave them in machine code that goes away."""
        self.state[STOP] = 1
        for event in self.awake:
            event.set()
        for thread in self.threads:
            thread.join(timeout=1)


POOL = Pool()
atexit.register(lambda: POOL.stop())


def _forked() -> None:
    """A child process has none of its parent's threads."""
    global POOL
    POOL = Pool()


os.register_at_fork(after_in_child=_forked)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Let the kernels that are called within run on that many threads."""
    POOL.use(threads)
    try:
        yield
    finally:
        POOL.state[BUSY] = 0


def state() -> np.ndarray:
    """What kernels take as their first argument."""
    return POOL.state
