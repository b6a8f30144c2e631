"""Tensors in other formats, a few rows at a time, on several threads.

Rows are read, decoded, encoded and handed on in panels, so what is in memory does not depend on the size of a
tensor, and the file's pages are let go behind them. The panels of all tensors make one queue: no thread waits
for the end of a tensor.
"""

import mmap
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from .. import files, formats
from ..errors import FormatError
from ..tensor import Tensor

Encode = Callable[[str, np.ndarray, np.ndarray | None], Tensor]

Result = TypeVar("Result")
PANEL = 1 << 18  # weights that are encoded together: with what an encoder makes of them they stay in caches


class Recoding(NamedTuple):
    """What is to become of a tensor.

    Attributes
    ----------
    tensor, format : what is there, and the format that is wanted.
    rows : int (tensor.rows,), the order in which its rows are wanted, or None.
    importance : float32 (matrices, cols), a weight for each column of each matrix of the tensor, or None.
    """

    tensor: Tensor
    format: str
    rows: np.ndarray | None = None
    importance: np.ndarray | None = None

    @property
    def arranged(self) -> Tensor:
        """The tensor with its rows in the result's order."""
        return self.tensor if self.rows is None else formats.take(self.tensor, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        if self.format == self.tensor.format:
            return self.tensor.nbytes
        cols = self.tensor.cols
        return self.tensor.rows * (
            formats.row_bytes(self.format, cols) + formats.apart_bytes(self.format, cols)
        )


class Stream(NamedTuple):
    """The result of a recoding, while it is made.

    Attributes
    ----------
    recoding : what is made.
    pieces : called once, after the pieces of all streams before this one were taken; gives its bytes.
    parts : what the format keeps apart from the codes, a piece for each that was taken.
    """

    recoding: Recoding
    pieces: Callable[[], Iterator[np.ndarray]]
    parts: dict[str, list[np.ndarray]]


@contextmanager
def streams(
    recodings: Sequence[Recoding], threads: int, path: object, encode: Encode = formats.quantize
) -> Iterator[list[Stream]]:
    """Streams of all recodings.

    Parameters
    ----------
    recodings : what becomes of each tensor, in the order in which they will be taken.
    threads : threads that compute.
    path : the source, for messages.
    encode : (format, w, importance) -> Tensor, called from several threads.
    """
    panels = [list(_panels(r)) for r in recodings]
    jobs = (
        partial(_recode, r, *panel, path, encode)
        for r, of in zip(recodings, panels, strict=True)
        for panel in of
    )
    with closing(in_order(jobs, threads)) as results:

        def pieces(count: int, parts: dict[str, list[np.ndarray]]) -> Iterator[np.ndarray]:
            for tensor in islice(results, count):
                for name, part in tensor.parts.items():
                    parts[name].append(part)
                yield tensor.data

        made = []
        for recoding, of in zip(recodings, panels, strict=True):
            parts: dict[str, list[np.ndarray]] = defaultdict(list)
            made.append(Stream(recoding, partial(pieces, len(of), parts), parts))
        yield made


def _panels(recoding: Recoding) -> Iterator[tuple[int, int]]:
    """First row and end of each panel, which lies in one matrix."""
    tensor, importance = recoding.tensor, recoding.importance
    height = tensor.rows // (1 if importance is None else len(importance))
    step = max(1, PANEL // tensor.cols)
    for first in range(0, tensor.rows, height):
        for start in range(first, first + height, step):
            yield start, min(start + step, first + height)


def _recode(recoding: Recoding, start: int, stop: int, path: object, encode: Encode) -> Tensor:
    """The rows start:stop of the result."""
    tensor, format, rows, importance = recoding
    order = np.arange(start, stop) if rows is None else rows[start:stop]
    part = formats.take(tensor, order)
    width = tensor.data.size // tensor.rows
    # with the page before them, of which the panel before had the other part
    files.release(tensor.data[max(order.min() * width - mmap.PAGESIZE, 0) : (order.max() + 1) * width])
    if format == tensor.format:
        return part
    # the values of a float format as they are, without a copy
    w = (
        formats.dequantize(part)
        if part.parts or formats.get(part.format).BLOCK > 1
        else formats.unpack(part)[0]
    )
    try:
        weights = None if importance is None else importance[start * len(importance) // tensor.rows]
        return encode(format, w, weights)
    except ValueError as e:
        where = f"tensor {tensor.name}, rows {start:,} to {stop - 1:,}"
        raise FormatError(path, where, found=f"{e}", expected="finite numbers that fit") from e


def in_order(jobs: Iterable[Callable[[], Result]], threads: int) -> Generator[Result, None, None]:
    """Results of the jobs, in their order; each thread may be one job ahead."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                ahead.append(pool.submit(job))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
