"""Random matrices in every format, with finite weights, for tests that compute with them."""

import numpy as np

from edgeq import formats
from edgeq.grid import Grid
from edgeq.kernels import lanes
from edgeq.tensor import Tensor

FLOATS = {"f32": np.float32, "f16": np.float16}


def random_tensor(name: str, rows: int, cols: int, rng: np.random.Generator) -> Tensor:
    """A matrix whose codes are random and whose scales are small; cols is rounded up to whole blocks."""
    block = formats.get(name).BLOCK
    cols = -(-cols // block) * block
    if name in FLOATS:
        data = rng.standard_normal((rows, cols)).astype(FLOATS[name])
    elif name == "bf16":
        data = (rng.standard_normal((rows, cols)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = rng.integers(0, 256, (rows, formats.row_bytes(name, cols)), dtype=np.uint8)
        blocks = data.reshape(-1, formats.get(name).BYTES)
        for at in F16_AT.get(name, ()):
            small = (rng.random(len(blocks)) * 0.05).astype("<f2")
            blocks[:, at : at + 2] = small.view(np.uint8).reshape(-1, 2)
        if name == "mxfp4":
            blocks[:, 0] = rng.integers(118, 126, len(blocks))
    parts = {"scale": rng.random(rows).astype(np.float32)} if formats.parts(formats.get(name)) else {}
    return Tensor(name, name, (rows, cols), data.reshape(-1).view(np.uint8), parts)


# where the blocks of a format have their float16 numbers
F16_AT = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}


def random_lanes(
    bits: int, group: int, offset: bool, rng: np.random.Generator
) -> tuple[np.ndarray, Grid, lanes.Lanes]:
    """Codes, grid and lanes of a matrix (32, 128); with an offset its codes count from 0."""
    rows, cols = 32, 128
    codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    scale, offsets = (rng.random((rows, cols // group)).astype(np.float16) for _ in range(2))
    zero = 0 if offset else (1 << bits) // 2
    grid = Grid(np.arange(1 << bits) - zero, scale, offsets if offset else None)
    record, columns = lanes.layout(grid, cols)
    data = np.empty((rows // 16, cols // columns), record)
    lanes.fill_grid(data, grid)
    lanes.fill_codes(data, codes)
    return codes, grid, lanes.Lanes(rows, cols, data, np.zeros(16, np.uint8), zero)
