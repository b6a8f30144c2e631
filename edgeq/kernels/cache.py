"""KVCache: the keys and values of the tokens seen so far, laid out for the attention kernels.

    keys    (kv_heads, blocks, head_dim, 16)     sixteen positions interleaved: a vector lane is a position
    values  (kv_heads, blocks * 16, width)       a vector lane is a dimension; width: whole vectors

so that neither the scores (q · k) nor the weighted sum of values ever adds across lanes. Keys are stored
turned by their position (see rope.py), and forgetting tokens in the middle turns the later ones back.
"""

from collections.abc import Sequence

import numpy as np

from .rope import Rope, rotate

LANES = 16


class KVCache:
    """Keys and values of up to `capacity` tokens, for one sequence.

    Attributes
    ----------
    length : tokens held.
    tokens : their ids.
    keys, values : one array a layer, as drawn above.
    ropes : the angles that each layer's keys were turned by.
    """

    def __init__(
        self, capacity: int, kv_heads: int, head_dim: int, ropes: Sequence[Rope], dtype: type
    ) -> None:
        blocks = -(-capacity // LANES)
        self.capacity, self.ropes = capacity, ropes
        self.tokens: list[int] = []
        self.keys = [np.zeros((kv_heads, blocks, head_dim, LANES), dtype) for _ in ropes]
        width = -(-head_dim // LANES) * LANES
        self.values = [np.zeros((kv_heads, blocks * LANES, width), dtype) for _ in ropes]
        # the same memory as kernels take it: Numba on the CPU has no float16
        self.kernel_keys, self.kernel_values = (
            [a.view(np.int16) if dtype == np.float16 else a for a in arrays]
            for arrays in (self.keys, self.values)
        )

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(a.nbytes for a in self.keys) + sum(a.nbytes for a in self.values)

    def read_keys(self, layer: int, stop: int) -> np.ndarray:
        """Keys of the positions before `stop`, (kv_heads, stop, head_dim)."""
        blocks = self.keys[layer][:, : -(-stop // LANES)]
        return blocks.swapaxes(2, 3).reshape(len(blocks), -1, blocks.shape[2])[:, :stop]

    def write(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values (n, kv_heads, head_dim) of the positions start .. start + n - 1."""
        at = np.arange(start, start + len(keys))
        self.keys[layer][:, at // LANES, :, at % LANES] = keys
        self.values[layer][:, at, : values.shape[2]] = values.swapaxes(0, 1)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        del self.tokens[length:]

    def shift(self, keep: int, drop: int) -> None:
        """Forget `drop` tokens after the first `keep`; the later ones move to, and turn back to, lower
        positions.
        """
        if keep < 0 or drop < 0 or keep + drop > self.length:
            raise ValueError(f"cannot drop {drop} tokens after {keep} from a cache of {self.length}")
        moved = slice(keep + drop, self.length)
        for layer, rope in enumerate(self.ropes if keep + drop < self.length else ()):
            keys = self.read_keys(layer, self.length)[:, moved].swapaxes(0, 1).astype(np.float32)
            # turning by -drop positions is turning by the angle of `drop` the other way
            n = len(keys)
            cos, sin = (np.broadcast_to(a[drop], (n, a.shape[1])) for a in (rope.cos, rope.sin))
            keys = rotate(keys, cos, -sin, rope.interleaved)
            self.write(layer, keep, keys, self.values[layer][:, moved].swapaxes(0, 1).copy())
        del self.tokens[keep : keep + drop]
