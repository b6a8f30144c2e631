"""Program: kernel calls that are recorded once and then made again without Python between them.

A decoded token is some hundred kernels of a few microseconds, and to call one from Python takes as long. For
the next token of the same sequence a model makes the same calls on the same arrays; all that changes is the
input, which is copied in, and the position, which the kernels read from memory.

A recorded call is two addresses: its machine code's, and its arguments' (see native.py).
"""

from collections.abc import Callable

import numpy as np

from . import jit, native
from .jit import kernel
from .pool import call_unit


@kernel("void(i8[:, ::1])")
def replay(calls):
    """Make the calls (machine code, arguments), one after the other."""
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
        self.words = [native.words(args) for _, args in self.calls]
        codes = [entry.code.address for entry, _ in self.calls]
        self.table = np.array([(c, w.buffer_info()[0]) for c, w in zip(codes, self.words, strict=True)])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The same for another x of that shape."""
        self.x[:] = x
        replay(self.table)
        return self.out
