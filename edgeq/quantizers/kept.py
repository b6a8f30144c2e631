"""Kept: what a method has made of a model so far, on the disk, from where an interrupted run goes on.

    FOLDER/run.json              what makes the run what it is
    FOLDER/METHOD/N/codes.safetensors    bytes of the tensors that were made N-th, and of their parts
    FOLDER/METHOD/N/tensors.json         their formats and shapes, and what they lost

A method that goes on reads the layers that it has through again, but looks at no inputs: the result has the
bytes that it would have had.
"""

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import files, formats
from ..calibrate import Held
from ..errors import EdgeqError, FormatError
from ..files import safetensors, safetensors_writer, strict_json
from ..files.output import Entry, whole
from ..files.packed import as_bytes
from ..files.source import Allowance
from ..tensor import Tensor

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration

RUN, CODES, TENSORS = "run.json", "codes.safetensors", "tensors.json"
LOOKED_AT = 1 << 12  # first bytes of each tensor, by which another model is known


class Kept:
    """What a method has made.

    Parameters
    ----------
    folder : where it is kept, and perhaps was before; None: in memory alone.

    Attributes
    ----------
    tensors : by name.
    lost : the error of those that have one, by name.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.times = folder, 0
        self.tensors: dict[str, Tensor] = {}
        self.lost: dict[str, float] = {}
        while folder and (at := folder / str(self.times)).is_dir():
            self._read(at)
            self.times += 1

    def settle(self, linear: Held, *, encoded: bool) -> bool:
        """Whether a linear of `calibrate.walk` was made already; it gets the weights that were `encoded`."""
        if not all(name in self.tensors for name in linear.names):
            return False
        if encoded:
            for name, w in linear.parts():
                w[:] = formats.dequantize(self.tensors[name])
        return True

    def add(self, tensors: Sequence[Tensor], lost: Mapping[str, float]) -> None:
        """Keep what was made at once; in a folder, not in memory, too."""
        if self.folder is None:
            self.tensors.update((t.name, t) for t in tensors)
            self.lost.update(lost)
            return
        told, entries = {}, []
        for t in tensors:
            arrays = {"": t.data, **t.parts}
            entries += [_bytes(t.name + part, array) for part, array in arrays.items()]
            told[t.name] = {
                "format": t.format,
                "shape": t.shape,
                "parts": {part: [a.dtype.str, a.shape] for part, a in t.parts.items()},
                "lost": lost.get(t.name),
            }
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.folder / str(self.times), nbytes=sum(e.nbytes for e in entries)) as (new,):
            new.mkdir()
            safetensors_writer.write_file(new / CODES, entries)
            (new / TENSORS).write_text(json.dumps(told) + "\n")
        self._read(self.folder / str(self.times))
        self.times += 1

    def _read(self, at: Path) -> None:
        allowance = Allowance()
        found = safetensors.read(at / CODES, allowance, words=True)
        for name, told in strict_json.read(at / TENSORS, allowance).items():
            try:
                parts = {
                    part: found[name + part].data.view(dtype).reshape(shape)
                    for part, (dtype, shape) in told["parts"].items()
                }
                t = Tensor(name, told["format"], tuple(told["shape"]), found[name].data, parts)
                if not parts and t.nbytes != t.rows * formats.row_bytes(t.format, t.cols):
                    raise ValueError(f"{t.nbytes:,} bytes of {t.format} {t.shape}")
            except (KeyError, TypeError, ValueError) as e:
                hint = "Remove the folder that it is in, and begin anew"
                raise FormatError(
                    at, f"tensor {name}", found=str(e), expected="what was made", hint=hint
                ) from e
            self.tensors[name] = t
            if told["lost"] is not None:
                self.lost[name] = told["lost"]


def _bytes(name: str, array: np.ndarray) -> Entry:
    data = as_bytes(array)
    return Entry(name, "U8", data.shape, data.nbytes, lambda: [data])


def identity(plan: "Plan", calibration: "Calibration", method: str, options: Mapping[str, Any]) -> dict:
    """What makes a run what it is, as JSON gives it back."""
    crc = 0
    for r in plan.recodings:
        crc = zlib.crc32(f"{r.tensor.name} {r.tensor.format} {r.tensor.shape} {r.format}".encode(), crc)
        crc = zlib.crc32(r.tensor.data[:LOOKED_AT].tobytes(), crc)
        files.release(r.tensor.data)  # of which the system reads more ahead
    text = calibration.text
    return json.loads(
        json.dumps(
            {
                "model or type": crc,
                "method": method,
                "options": dict(options),
                "text": text if text is None else zlib.crc32(text.encode()),
                **{key: getattr(calibration, key) for key in ("chunks", "ctx", "seed", "backend")},
            }
        )
    )


def begin(folder: Path, run: Mapping[str, Any]) -> None:
    """Make a folder for a run; EdgeqError if it is another's."""
    if not (path := folder / RUN).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EdgeqError(f"{folder} is something else: what was made so far would be kept there")
        if not folder.parent.is_dir():
            raise EdgeqError(f"{folder.parent} is no folder: {folder.name} would be written there")
        folder.mkdir(exist_ok=True)
        with whole(path, nbytes=1 << 16) as (new,):
            new.write_text(json.dumps(run) + "\n")
        return
    before = strict_json.read(path, Allowance())
    if changed := [key for key, value in run.items() if before.get(key) != value]:
        raise EdgeqError(
            f"{folder} is of a run with another {' and '.join(changed)}: give the same, or begin anew"
        )


def discard(folder: Path) -> None:
    """Remove the folder of a run, and nothing else."""
    if (folder / RUN).is_file():
        shutil.rmtree(folder)
