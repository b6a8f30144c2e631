"""A scan for weights that are no numbers: NaN or infinite scales, offsets and values.

No container promises that its numbers are finite, and one NaN in a scale turns every answer of a model into
noise. The scan reads the whole file, so it is made when asked for.
"""

from collections.abc import Iterable

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor
from .source import shown

CHUNK = 1 << 20  # weights unpacked at a time


def check_finite(path: object, tensors: Iterable[Tensor]) -> None:
    """FormatError that names the first tensor and row of `path` with a value that is not finite."""
    for tensor in tensors:
        step = max(1, CHUNK // max(1, tensor.cols))
        for start in range(0, tensor.rows if tensor.nbytes else 0, step):
            codes, grid = formats.unpack(tensor, start, min(start + step, tensor.rows))
            for numbers in (codes, None) if grid is None else (grid.scale, grid.offset):
                if numbers is not None and not np.isfinite(numbers).all():
                    row, col = np.argwhere(~np.isfinite(numbers))[0]
                    where = f"tensor {shown(tensor.name)}, row {start + row:,}"
                    raise FormatError(path, where, found=f"{numbers[row, col]}", expected="finite numbers")
