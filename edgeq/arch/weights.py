"""Weights: a file's tensors, handed out by name with their shapes checked, and turned into operations."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor

Progress = Callable[[str, int, int], None]


class Weights:
    """The tensors of a file and the backend that computes with them; reports progress in bytes as they are
    prepared.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        ops: ModuleType,
        path: object,
        progress: Progress | None = None,
        release: Callable[[np.ndarray], None] = lambda data: None,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.tensors, self.ops, self.path = tensors, ops, path
        self.progress, self.release, self.turn = progress, release, turn
        self.done, self.total = 0, sum(t.nbytes for t in tensors.values() if len(t.shape) > 1)
        if "output.weight" in tensors and "token_embd.weight" in tensors:
            self.total -= tensors["token_embd.weight"].nbytes  # looked up in the file, not prepared

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name; FormatError when it is missing or has another shape."""
        if name not in self.tensors:
            raise FormatError(
                self.path, f"tensor {name}", found="nothing", expected=f"a tensor of shape {shape}"
            )
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise FormatError(
                self.path, f"tensor {name}", found=f"shape {tensor.shape}", expected=f"shape {shape}"
            )
        return tensor

    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            found = "nothing" if embedding is None else f"shape {embedding.shape}"
            raise FormatError(
                self.path, "tensor token_embd.weight", found=found, expected="a matrix (vocabulary, dim)"
            )
        return embedding.rows

    def vector(self, name: str, size: int) -> np.ndarray:
        """A bias, or other numbers, float32 (size,)."""
        return formats.dequantize(self.tensor(name, size)).reshape(-1)

    def gain(self, name: str, size: int, plus: float = 0.0) -> np.ndarray:
        """The gains of a norm, float32 (size,), to which something is to be added."""
        return self.vector(name, size) + np.float32(plus)

    def optional_vector(self, name: str, size: int) -> np.ndarray | None:
        """Like `vector`, or None when the file has no tensor of that name."""
        return self.vector(name, size) if name in self.tensors else None

    def linear(self, cols: int, rows: Mapping[str, int], *, batches: bool = True) -> Any:
        """x @ Wᵀ + b of several matrices stacked, e.g. ``linear(576, {"blk.0.attn_q": 576, "blk.0.attn_k":
        192})``; the result has their `names` and `shapes`.
        """
        matrices = [self.tensor(f"{name}.weight", n, cols) for name, n in rows.items()]
        biases = [self.optional_vector(f"{name}.bias", n) for name, n in rows.items()]
        bias = None
        if any(b is not None for b in biases):
            bias = np.concatenate(
                [
                    np.zeros(n, np.float32) if b is None else b
                    for b, n in zip(biases, rows.values(), strict=True)
                ]
            )
        if self.done == 0:
            self._report()
        with self.turn():
            f = self.ops.linear(matrices, bias, batches=batches, release=self.release)
        f.names, f.shapes = tuple(m.name for m in matrices), tuple(m.shape for m in matrices)
        self.done += sum(m.nbytes for m in matrices)
        self._report()
        return f

    def _report(self) -> None:
        if self.progress:
            self.progress("preparing weights", self.done, self.total)

    def head(self, rows: int, cols: int) -> Any:
        """The output matrix, which is the embedding's where the file has none of its own."""
        name = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(cols, {name: rows}, batches=False)
