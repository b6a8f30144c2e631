"""Models from nothing: a vocabulary learned from a text, weights drawn at random, and batches of that text.

What is made has GGUF's own names and order of rows, so it is trained, written and read as any other Llama.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from ..tensor import Tensor
from ..tokenizer import bpe
from ..tokenizer.core import Kind
from ..tokenizer.gguf import KEY
from .data import Batch
from .merge import float_tensor

PRE = "gpt-2"  # how text is cut into words, as GGUF files name it
END = "<|endoftext|>"  # between two texts, before the first and after the last


class Shape(NamedTuple):
    """Shape of a Llama whose output matrix is its embedding."""

    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    context: int


def vocabulary(texts: Sequence[str], size: int) -> dict[str, Any]:
    """A byte-level vocabulary learned from texts, as GGUF's keys: `END`, the 256 bytes, and what merges of
    frequent neighbors make.
    """
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = bpe.cutter(bpe.CUTS[PRE])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    ids = engine.get_vocab()
    kinds = np.full(len(ids), Kind.NORMAL, np.int32)
    kinds[ids[END]] = Kind.CONTROL
    return {
        KEY + "model": "gpt2",
        KEY + "pre": PRE,
        KEY + "tokens": sorted(ids, key=ids.__getitem__),
        KEY + "token_type": kinds,
        KEY + "merges": [" ".join(pair) for pair in json.loads(engine.model.__getstate__())["merges"]],
        KEY + "bos_token_id": ids[END],
        KEY + "eos_token_id": ids[END],
        KEY + "add_bos_token": True,
    }


def metadata(shape: Shape, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of such a model."""
    llama = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.dim,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.dim // shape.heads,
        "rope.freq_base": 10000.0,
        "vocab_size": len(vocabulary[KEY + "tokens"]),
    }
    return {
        "general.architecture": "llama",
        "general.type": "model",
        **{f"llama.{key}": value for key, value in llama.items()},
        **vocabulary,
    }


def tensors(shape: Shape, vocab: int, seed: int) -> dict[str, Tensor]:
    """Weights to begin with, float32: normal, such that each matrix keeps the size of what it is given.

    What is added to the residual stream is smaller by the root of how much is added.
    """
    rng, kv = np.random.default_rng(seed), shape.dim // shape.heads * shape.kv_heads
    added = (2 * shape.layers) ** -0.5

    def normal(rows: int, cols: int, size: float = 1.0) -> np.ndarray:
        return rng.standard_normal((rows, cols), np.float32) * np.float32(size * cols**-0.5)

    made = {"token_embd": normal(vocab, shape.dim, 0.3), "output_norm": np.ones(shape.dim)}
    for i in range(shape.layers):
        layer = {
            "attn_norm": np.ones(shape.dim),
            "attn_q": normal(shape.dim, shape.dim),
            "attn_k": normal(kv, shape.dim),
            "attn_v": normal(kv, shape.dim),
            "attn_output": normal(shape.dim, shape.dim, added),
            "ffn_norm": np.ones(shape.dim),
            "ffn_gate": normal(shape.ffn, shape.dim),
            "ffn_up": normal(shape.ffn, shape.dim),
            "ffn_down": normal(shape.dim, shape.ffn, added),
        }
        made |= {f"blk.{i}.{name}": w for name, w in layer.items()}
    return {f"{name}.weight": float_tensor(f"{name}.weight", w) for name, w in made.items()}


class Stretches:
    """Batches of stretches of one long text, each from a place of its own: no two epochs cut it alike.

    Parameters
    ----------
    ids : int (n,), the text.
    size, length : stretches of a batch, and tokens of each.
    seed : of the places.
    """

    def __init__(self, ids: np.ndarray, size: int, length: int, seed: int) -> None:
        self.ids, self.size, self.length, self.seed = ids, size, length, seed

    def fingerprint(self) -> int:
        """A number that another text would hardly have."""
        return zlib.crc32(self.ids.tobytes())

    def batch(self, number: int) -> Batch:
        """The batch of that number, from 0."""
        rng = np.random.default_rng([self.seed, number])
        starts = rng.integers(len(self.ids) - self.length, size=(self.size, 1))
        rows = self.ids[starts + np.arange(self.length + 1)]
        return Batch(rows[:, :-1], rows[:, 1:], np.ones((self.size, self.length), bool))
