"""KVCache: the keys and values of the tokens seen so far, laid out for the attention kernels.

    keys    (kv_heads, blocks, head_dim, 16)     sixteen positions interleaved: a vector lane is a position
    values  (kv_heads, blocks * 16, width)       a vector lane is a dimension; width: whole vectors

so that neither the scores (q · k) nor the weighted sum of values ever adds across lanes. Keys are stored
turned by their position (see rope.py), and forgetting tokens in the middle turns the later ones back.

Elements are float32, float16 or "q8_0": then 32 dimensions of a position share a float16 scale, and the
arrays hold records of them,

    keys    (kv_heads, blocks, head_dim / 32)         scale f16 (16,), codes int8 (32, 16)
    values  (kv_heads, blocks * 16, head_dim / 32)    scale f16, codes int8 (32,)
"""

import mmap
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from .rope import Rope, rotate

LANES, GROUP = 16, 32
BLOCKS = 4  # that kernels may read at once: there are whole fours of them
Q8_KEYS = np.dtype([("scale", "<f2", LANES), ("codes", "i1", (GROUP, LANES))])
Q8_VALUES = np.dtype([("scale", "<f2"), ("codes", "i1", GROUP)])
TYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "q8_0": None}
BYTES = {"f32": 4, "f16": 2, "q8_0": Q8_VALUES.itemsize / GROUP}  # of a number


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros that takes memory page by page, where it is written to.

    NumPy asks for huge pages, and a single token then takes one of 2 MB for every few heads of a layer.
    """
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class KVCache:
    """Keys and values of up to `capacity` tokens, for one sequence.

    Parameters
    ----------
    capacity : most tokens.
    kv_heads, head_dim : of every layer.
    ropes : the angles that each layer's keys are turned by.
    key_type, value_type : "f32", "f16" or "q8_0" (which needs a head_dim that is a multiple of 32).

    Attributes
    ----------
    length : tokens held.
    tokens : their ids.
    keys, values : one array a layer, as drawn above.
    types : of keys and values, as given.
    starts : int64 (1,): tokens before those that are being computed, where the kernels look for it.
    programs : what a backend keeps of computations that come again.
    """

    def __init__(
        self,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        ropes: Sequence[Rope],
        key_type: str = "f16",
        value_type: str = "f16",
    ) -> None:
        if "q8_0" in (key_type, value_type) and head_dim % GROUP:
            raise ValueError(
                f"a cache of q8_0 needs heads of a multiple of {GROUP} numbers, found {head_dim}"
            )
        blocks = -(-capacity // (LANES * BLOCKS)) * BLOCKS
        self.capacity, self.ropes, self.head_dim = capacity, ropes, head_dim
        self.types = key_type, value_type
        self.tokens: list[int] = []
        self.starts = np.zeros(1, np.int64)
        self.programs: dict[Any, Any] = {}
        width = -(-head_dim // LANES) * LANES
        groups = head_dim // GROUP
        keys, values = TYPES[key_type], TYPES[value_type]
        key_shape = (kv_heads, blocks, groups) if keys is None else (kv_heads, blocks, head_dim, LANES)
        value_shape = (kv_heads, blocks * LANES, groups if values is None else width)
        self.keys = [_zeros(key_shape, keys or Q8_KEYS) for _ in ropes]
        self.values = [_zeros(value_shape, values or Q8_VALUES) for _ in ropes]

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
        keys = self.keys[layer][:, : -(-stop // LANES)]
        if keys.dtype == Q8_KEYS:
            keys = keys["codes"] * keys["scale"].astype(np.float32)[:, :, :, None]
            keys = keys.reshape(*keys.shape[:2], self.head_dim, LANES)
        return keys.swapaxes(2, 3).reshape(len(keys), -1, self.head_dim)[:, :stop]

    def read_values(self, layer: int, stop: int) -> np.ndarray:
        """Values of the positions before `stop`, (kv_heads, stop, head_dim)."""
        values = self.values[layer][:, :stop]
        if values.dtype == Q8_VALUES:
            values = values["codes"] * values["scale"].astype(np.float32)[..., None]
            values = values.reshape(*values.shape[:2], self.head_dim)
        return values[..., : self.head_dim]

    def write(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values (n, kv_heads, head_dim) of the positions start .. start + n - 1."""
        at = np.arange(start, start + len(keys))
        to_keys, to_values = self.keys[layer], self.values[layer]
        if to_keys.dtype == Q8_KEYS:
            scale, codes = _quantize(keys)
            to_keys["scale"][:, at // LANES, :, at % LANES] = scale
            to_keys["codes"][:, at // LANES, :, :, at % LANES] = codes
        else:
            to_keys[:, at // LANES, :, at % LANES] = keys
        if to_values.dtype == Q8_VALUES:
            scale, codes = _quantize(values)
            to_values["scale"][:, at] = scale.swapaxes(0, 1)
            to_values["codes"][:, at] = codes.swapaxes(0, 1)
        else:
            to_values[:, at, : self.head_dim] = values.swapaxes(0, 1)

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
            values = self.read_values(layer, self.length)[:, moved].swapaxes(0, 1)
            self.write(layer, keep, keys, values.copy())
        del self.tokens[keep : keep + drop]


def _quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x float32 (n, heads, head_dim) -> scales (n, heads, groups), codes int8 (n, heads, groups, 32): ggml's
    q8_0.
    """
    x = x.astype(np.float32).reshape(*x.shape[:2], -1, GROUP)
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return scale, np.rint(x * inverse[..., None]).astype(np.int8)
