"""Config: a model's shape, read and checked from GGUF metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from ..kernels.cache import BLOCKS, BYTES, LANES

# No real model comes near these; a file beyond them is broken or hostile, and must not make edgeq allocate.
LIMITS = {
    "block_count": 1 << 12,
    "context_length": 1 << 28,
    "embedding_length": 1 << 18,
    "feed_forward_length": 1 << 20,
    "attention.head_count": 1 << 14,
    "attention.head_count_kv": 1 << 14,
    "attention.key_length": 1 << 12,
    "attention.value_length": 1 << 12,
    "attention.sliding_window": 1 << 28,
    "rope.dimension_count": 1 << 12,
}


class Keys:
    """The metadata of one architecture, with every value checked as it is read."""

    def __init__(self, meta: Mapping[str, Any], path: object) -> None:
        self.meta, self.path = meta, path
        self.name = str(meta.get("general.architecture"))

    def fail(self, key: str, found: object, expected: str) -> FormatError:
        """The error for a key of this file."""
        return FormatError(self.path, f"metadata {self.name}.{key}", found=repr(found), expected=expected)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer from `least` to the key's limit; where it is a list, all its entries must be equal."""
        value = self.meta.get(f"{self.name}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LIMITS[key]:
            raise self.fail(key, value, f"an integer from {least} to {LIMITS[key]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self.meta.get(f"{self.name}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fail(key, value, "a finite positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.meta.get(f"{self.name}.{key}", default)
        if not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value


@dataclass(frozen=True)
class Config:
    """Shape of a decoder-only transformer.

    Attributes
    ----------
    name : architecture, a module of ``edgeq.arch``.
    layers, dim, ffn : blocks, width of the residual stream, width of the feed-forward part.
    heads, kv_heads, head_dim : attention's shape.
    vocab_size, context_length : tokens, and positions the model was trained for.
    eps : epsilon of the RMS norms.
    rope_base, rope_dims, rope_factors, interleaved : see ``kernels/rope.py``.
    windows : positions that each layer sees, 0 for all.
    """

    name: str
    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eps: float
    rope_base: float
    rope_dims: int
    rope_factors: np.ndarray | float
    interleaved: bool
    windows: tuple[int, ...]

    def cache_bytes(self, capacity: int, keys: str, values: str) -> int:
        """Bytes of the keys and values of `capacity` tokens, of these types (see ``kernels/cache.py``)."""
        width = -(-self.head_dim // LANES) * LANES
        positions = -(-capacity // (LANES * BLOCKS)) * LANES * BLOCKS
        a_position = self.head_dim * BYTES[keys] + width * BYTES[values]
        return round(self.layers * self.kv_heads * positions * a_position)


def read(meta: Mapping[str, Any], vocab_size: int, path: object, *, interleaved: bool) -> Config:
    """The part of a Config that all architectures state alike."""
    keys = Keys(meta, path)
    layers, dim = keys.integer("block_count"), keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise keys.fail("attention.head_count_kv", kv_heads, f"a divisor of the {heads} query heads")
    head_dim = keys.integer("attention.key_length", max(dim // heads, 1))
    if (value_dim := keys.integer("attention.value_length", head_dim)) != head_dim:
        raise keys.fail("attention.value_length", value_dim, f"the key length, {head_dim}")
    rope_dims = keys.integer("rope.dimension_count", head_dim)
    if rope_dims > head_dim or rope_dims % 2 or head_dim % 2:
        raise keys.fail(
            "rope.dimension_count", rope_dims, f"an even number up to the even head length {head_dim}"
        )
    # as llama.cpp reads them: no type means linear, early files call the factor scale_linear, and 0 means
    # none
    scaling = keys.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise keys.fail("rope.scaling.type", scaling, "none or linear")
    early = meta.get(f"{keys.name}.rope.scale_linear", 1.0) or 1.0
    factor = keys.number("rope.scaling.factor", early) if scaling == "linear" else 1.0
    window = keys.integer("attention.sliding_window", 0, least=0)
    return Config(
        name=keys.name,
        layers=layers,
        dim=dim,
        ffn=keys.integer("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=keys.integer("context_length"),
        eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_base=keys.number("rope.freq_base", 10000.0),
        rope_dims=rope_dims,
        rope_factors=factor,
        # a Hugging Face folder keeps the rows of q and k in halves, where GGUF's llama files interleave them
        interleaved=interleaved and not meta.get("edgeq.rope_in_halves", False),
        windows=(window,) * layers,
    )
