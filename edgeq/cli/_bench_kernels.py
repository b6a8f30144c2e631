"""`edgeq bench --kernels`: the matrix products of every weight format, beside the limits of the machine.

    one token     a matrix much larger than the caches: GB/s of prepared weights, of those that can be read
    many tokens   10⁹ products of integers a second, of those that can be made in registers

A machine's speed changes from one second to the next. So limits and products are measured in turn, the best
of each counts, and each format is compared to limits of its own. (Float formats multiply floats, and are
compared to products of integers all the same.)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ._console import Progress

if TYPE_CHECKING:
    from ..tensor import Tensor

COLS, TOKENS, ROWS = 2048, 512, 4096  # ROWS: of the matrix that many tokens meet
STREAMED = 1 << 28  # bytes of the matrix that one token meets
SOURCE_ROWS = 256  # random ones, which both matrices repeat

Work = Callable[[], int]


def measure(names: Sequence[str], threads: int, repetitions: int, report: Progress) -> list[dict[str, Any]]:
    """Results of these formats, on so many threads."""
    from ..kernels import limits, numba_backend, simd

    bounds, results = limits.Limits(), []
    bound_works: dict[str, Work] = {f"read {n}": partial(bounds.read, n) for n in limits.STREAMS}
    bound_works["multiply"] = bounds.multiply
    total = len(names) * (repetitions + 1)
    with numba_backend.computing(threads):
        for number, name in enumerate(names):
            done = number * (repetitions + 1)
            report("measuring kernels", done, total)
            bits, works = products(name)
            numba_backend.ready(report)
            works |= bound_works
            for work in works.values():  # what is compiled, or comes into caches, does so now
                work()
            best = dict.fromkeys(works, 0.0)
            for turn in range(repetitions):
                report("measuring kernels", done + 1 + turn, total)
                best = {key: max(best[key], rate(work)) for key, work in works.items()}
            del works, work  # the next format takes as much memory
            read = max(best[f"read {n}"] for n in limits.STREAMS)
            results.append({
                "path": simd.PATH.name,
                "n_threads": threads,
                "format": name,
                "bits_per_weight": bits,
                "one_gbs": best["one"],
                "read_gbs": read,
                "one_share": best["one"] / read,
                "many_gmacs": best["many"],
                "multiply_gmacs": best["multiply"],
                "many_share": best["many"] / best["multiply"],
            })  # fmt: skip
    report("measuring kernels", total, total)
    return results


def rate(work: Work) -> float:
    """10⁹ of what it does, a second."""
    start = time.perf_counter_ns()
    return work() / (time.perf_counter_ns() - start)


def products(name: str) -> tuple[float, dict[str, Work]]:
    """Bits that a weight of this format takes when it is prepared, and the two products."""
    import numpy as np

    from ..kernels import lanes, numba_backend

    source = matrix(name)
    nbytes = lanes.room([source]).data.nbytes
    copies = -(-STREAMED // nbytes)
    streamed = numba_backend.linear([source] * copies, batches=False)
    square = numba_backend.linear([source] * (ROWS // SOURCE_ROWS))
    x = np.random.default_rng(0).standard_normal((TOKENS, COLS)).astype(np.float32)

    def one() -> int:
        streamed(x[:1])
        return copies * nbytes

    def many() -> int:
        square(x)
        return TOKENS * COLS * ROWS

    return 8 * nbytes / (SOURCE_ROWS * COLS), {"one": one, "many": many}


def matrix(name: str) -> "Tensor":
    """Random weights (SOURCE_ROWS, COLS): ordinary numbers, wherever a format keeps its scales."""
    import numpy as np

    from .. import formats
    from ..tensor import Tensor

    size = SOURCE_ROWS * formats.row_bytes(name, COLS)
    data = np.random.default_rng(0).integers(0x30, 0x40, size, np.uint8)
    apart = formats.parts(formats.get(name))
    parts = {"scale": np.ones(SOURCE_ROWS, np.float32)} if apart else {}
    return Tensor(name, name, (SOURCE_ROWS, COLS), data, parts)


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A table of the results."""
    heads = ["format", "path", "threads", "bits", "1 token GB/s", "read", "share"]
    made = [[*heads, f"{TOKENS} tokens GMAC/s", "multiply", "share"], ["---", *["---:"] * 9]]
    for r in results:
        made.append([
            r["format"],
            r["path"],
            str(r["n_threads"]),
            f"{r['bits_per_weight']:.2f}",
            f"{r['one_gbs']:.1f}",
            f"{r['read_gbs']:.1f}",
            f"{r['one_share']:.0%}",
            f"{r['many_gmacs']:.0f}",
            f"{r['multiply_gmacs']:.0f}",
            f"{r['many_share']:.0%}",
        ])  # fmt: skip
    return made
