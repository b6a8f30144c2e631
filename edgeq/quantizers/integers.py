"""Integer layers: what the methods share whose result is a folder in compressed-tensors, which GGUF files
cannot hold: integers with a scale for a row or a matrix, and word of how inputs are rounded.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import calibrate, formats
from ..convert import huggingface
from ..convert.source import Source
from ..errors import EdgeqError
from ..observers import Observer
from ..tensor import Tensor
from . import layerwise

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration

Progress = Callable[[str, int, int], None]
FLOATS = ("f32", "f16", "bf16")


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
        tensor = r.tensor if r.rows is None else formats.take(r.tensor, r.rows)
        yield tensor, formats.dequantize(tensor)


def observe(
    plan: "Plan", calibration: "Calibration", make: Callable[[], Observer], progress: Progress | None
) -> dict[tuple[str, ...], Observer]:
    """`calibrate.observe` of the model of a plan."""
    windows = layerwise.windows_of(plan, calibration, progress)
    model = layerwise.model(plan, calibration.backend, calibration.threads)
    return calibrate.observe(model, windows, make, progress=progress)


def holding(plan: "Plan", made: dict[str, Tensor]) -> "Plan":
    """The plan with these tensors in place of those of their names, each written as it is."""
    return plan._replace(
        recodings=[
            r._replace(tensor=tensor, format=tensor.format, rows=None)
            if (tensor := made.get(r.tensor.name)) is not None
            else r
            for r in plan.recodings
        ]
    )


def write(
    plan: "Plan",
    dst: Path,
    *,
    threads: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a plan whose layers have integers, all of one kind, as a Hugging Face folder."""
    if dst.suffix == ".gguf":
        raise EdgeqError(f"GGUF files have no type for these integers: name a folder instead of {dst}")
    ours = [r.tensor for r in plan.recodings if r.tensor.parts]
    first, groups = ours[0], {t.cols // t.parts["scale"].shape[1] for t in ours}
    group = None if groups == {t.cols for t in ours} else groups.pop()
    target = huggingface.target("compressed-tensors", first.format, "zero" not in first.parts, group)
    whole = all(np.ptp(t.parts["scale"]) == 0 for t in ours)
    target = target._replace(scheme=target.scheme._replace(whole=whole))
    source = Source(plan.source, plan.meta, layerwise._arranged(plan), {})
    outtype = f"int{target.scheme.bits}"
    return huggingface.write(
        source, dst, outtype, target, threads=threads, max_size=max_size, progress=progress
    )
