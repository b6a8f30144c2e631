#!/usr/bin/env python3
"""Compare the encoders with llama.cpp's: weighted squared error and time, on the matrices of a model.

    python tools/encoder_errors.py MODEL-f16.gguf --imatrix FILE [--library libggml-base.so] [--rows 256]

Without importance the error is the sum of squares, with it each column's squares weigh as much as it is
important. A row of the table has the ratio of all errors, ours to llama.cpp's, geometric mean and largest of
the matrices whose rows hold whole blocks, and the ratio of processor time on one thread.

The library comes with llama-cpp-python 0.3.36. Two matrices and what llama.cpp makes of them are kept for the
tests with --goldens tests/golden/encoders.npz.
"""

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeq import formats
from edgeq.files import gguf, imatrix
from edgeq.kernels import encode
from edgeq.tensor import Tensor

TYPES = (
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
)  # fmt: skip
KEPT = {"down": ("blk.15.ffn_down.weight", 6), "gate": ("blk.3.ffn_gate.weight", 12)}


def main() -> None:
    """Print the table, or write the goldens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--library", type=Path, help="default: that of llama_cpp, if it is installed")
    parser.add_argument("--rows", type=int, default=256, help="of each matrix")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--goldens", type=Path)
    args = parser.parse_args()
    peer = Peer(args.library or library())
    tensors, importances = gguf.read(args.model)[1], imatrix.read(args.imatrix).importance
    if args.goldens:
        np.savez_compressed(args.goldens, **goldens(peer, tensors, importances))
        return
    print("| type | importance | error, mean | error, largest | time |\n|---|---|---:|---:|---:|")
    for name in args.types:
        for weighted in (False, True):
            print(row(peer, name, tensors, importances, weighted, args.rows), flush=True)


def library() -> Path:
    """libggml-base of llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed here. Name its libggml-base.so with --library")
    return Path(spec.origin).parent / "lib" / "libggml-base.so"


class Peer:
    """llama.cpp's encoders."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            pointer,
            pointer,
            size,
            size,
            size,
            pointer,
        ]
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def __call__(self, name: str, w: np.ndarray, importance: np.ndarray | None) -> Tensor:
        """Encode w float32 (rows, cols)."""
        rows, cols = w.shape
        data = np.empty(rows * formats.row_bytes(name, cols), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        self.library.ggml_quantize_chunk(
            formats.get(name).GGML, w.ctypes.data, data.ctypes.data, 0, rows, cols, weights
        )
        return Tensor("", name, w.shape, data)


def error(w: np.ndarray, tensor: Tensor, importance: np.ndarray | None) -> float:
    """Weighted squared error."""
    squares = (w.astype(np.float64) - formats.dequantize(tensor)) ** 2
    return float((squares * (1 if importance is None else importance)).sum())


def timed(f: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What f gives, and the processor time that it took."""
    start = time.thread_time()
    return f(), time.thread_time() - start


def row(peer: Peer, name: str, tensors: dict, importances: dict, weighted: bool, rows: int) -> str:
    """A row of the table."""
    ratios, times = [], np.zeros(2)
    encode.quantize(name, np.zeros((1, 256), np.float32), np.ones(256, np.float32))  # compiles
    for key, measured in importances.items():
        tensor = tensors[key]
        if tensor.cols % formats.get(name).BLOCK:
            continue
        w = formats.dequantize(tensor, 0, min(rows, tensor.rows))
        importance = np.ascontiguousarray(measured, np.float32) if weighted else None
        ours, our_time = timed(lambda w=w, i=importance: encode.quantize(name, w, i))
        theirs, their_time = timed(lambda w=w, i=importance: peer(name, w, i))
        ratios.append(error(w, ours, importance) / error(w, theirs, importance))
        times += our_time, their_time
    mean = np.exp(np.log(ratios).mean())
    mark = "yes" if weighted else ""
    return f"| {name} | {mark} | {mean:.4f} | {max(ratios):.4f} | {times[0] / times[1]:.2f} |"


def goldens(peer: Peer, tensors: dict, importances: dict) -> dict[str, np.ndarray]:
    """Rows of two matrices as float16, the importance of their columns, and llama.cpp's errors of each type
    without importance and with it.
    """
    out = {}
    for label, (key, rows) in KEPT.items():
        w = formats.dequantize(tensors[key], 0, rows)
        importance = np.ascontiguousarray(importances[key], np.float32)
        out[label], out[f"{label} importance"] = w.astype(np.float16), importance
        for name in TYPES:
            if w.shape[1] % formats.get(name).BLOCK == 0:
                pair = [error(w, peer(name, w, i), i) for i in (None, importance)]
                out[f"{label} {name}"] = np.array(pair)
    return out


if __name__ == "__main__":
    main()
