"""Random matrices in every format, with finite weights, for tests that compute with them."""

import numpy as np

from edgeq import formats
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
    parts = {"scale": rng.random(rows).astype(np.float32)} if name == "i8" else {}
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
