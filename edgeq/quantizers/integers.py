"""Integer layers, stored in Hugging Face folders: GGUF files have no place for integers with a scale for a
row, or for any group of columns, and no word of how inputs are rounded.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from .. import calibrate, formats, uniform
from ..convert import huggingface
from ..convert.source import Source, order
from ..errors import EdgeqError
from ..files import compressed_tensors, hqq
from ..observers import Observer
from ..tensor import Tensor
from . import layerwise
from .mix import FLOATS

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration

Progress = Callable[[str, int, int], None]


def matrices(plan: "Plan") -> Iterator[tuple[Tensor, np.ndarray]]:
    """Matrices of the layers, and their weights float32 (rows, cols)."""
    for r in plan.recodings:
        if not r.tensor.name.startswith("blk.") or len(r.tensor.shape) != 2:
            continue
        if r.tensor.format not in FLOATS:
            raise EdgeqError(
                f"{plan.source}: tensor {r.tensor.name} is {r.tensor.format} already, and would lose a "
                "second time. Start from the original"
            )
        tensor = r.arranged
        yield tensor, formats.dequantize(tensor)


def observe(
    plan: "Plan", calibration: "Calibration", make: Callable[[], Observer], progress: Progress | None
) -> dict[tuple[str, ...], Observer]:
    """`calibrate.observe` of the model of a plan."""
    windows = layerwise.windows_of(plan, calibration, progress)
    model = layerwise.model(plan, calibration.backend, calibration.threads)
    return calibrate.observe(model, windows, make, progress=progress)


def types(source: Source, kind: uniform.Kind, name: str) -> dict[str, str]:
    """The type of each tensor where matrices of the layers are such integers; the others are floats."""
    if kind.bits == 1 and kind.symmetric:
        raise ValueError(f"{name}: one bit needs zero points, {name}-asym; signs alone are the method binary")
    made = {}
    for key in sorted(source.tensors, key=order):
        tensor = source.tensors[key]
        made[key] = tensor.format if tensor.format in FLOATS else "f16"
        if key.startswith("blk.") and len(tensor.shape) == 2:
            if tensor.cols % (kind.group or 32):
                raise EdgeqError(
                    f"{source.path}: tensor {key} has {tensor.cols} columns, which are no whole groups of "
                    f"{kind.group or 32}. Take groups that divide them: {kind.format}-g32"
                )
            made[key] = name
    return made


def wanted(plan: "Plan") -> uniform.Kind | None:
    """The integers that are yet to be encoded."""
    kinds = (uniform.kind(r.format) for r in plan.recodings if r.format != r.tensor.format)
    return next(filter(None, kinds), None)


def target(plan: "Plan", layout: str | None) -> huggingface.Target:
    """How a folder will store the integers of a plan, encoded already or not."""
    if kind := wanted(plan):
        usual = hqq.METHOD if kind.bits == 1 else compressed_tensors.METHOD  # which has none of one bit
        return huggingface.target(layout or usual, kind.format, kind.symmetric, kind.group)
    tensors = {r.tensor.name: r.tensor for r in plan.recodings}
    floating = any(t.parts["zero"].dtype != np.uint8 for t in tensors.values() if "zero" in t.parts)
    single = any(t.format == "i1" for t in tensors.values())
    layout = layout or (hqq.METHOD if floating or single else compressed_tensors.METHOD)
    return huggingface.present(Source(plan.source, plan.meta, tensors, {}), layout)
