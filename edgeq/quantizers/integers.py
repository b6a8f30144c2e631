"""Integer layers: what the methods share whose result is a folder in compressed-tensors, which GGUF files
cannot hold: integers with a scale for a row or a matrix, and word of how inputs are rounded.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import calibrate, formats
from ..convert import huggingface
from ..errors import EdgeqError
from ..files import compressed_tensors
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
        tensor = r.tensor if r.rows is None else formats.take(r.tensor, r.rows)
        yield tensor, formats.dequantize(tensor)


def observe(
    plan: "Plan", calibration: "Calibration", make: Callable[[], Observer], progress: Progress | None
) -> dict[tuple[str, ...], Observer]:
    """`calibrate.observe` of the model of a plan."""
    windows = layerwise.windows_of(plan, calibration, progress)
    model = layerwise.model(plan, calibration.backend, calibration.threads)
    return calibrate.observe(model, windows, make, progress=progress)


def target(made: Sequence[Tensor]) -> huggingface.Target:
    """How compressed-tensors stores such integers, all of one kind."""
    first, groups = made[0], {t.cols // t.parts["scale"].shape[1] for t in made}
    group = None if groups == {t.cols for t in made} else groups.pop()
    found = huggingface.target(compressed_tensors.METHOD, first.format, "zero" not in first.parts, group)
    whole = all(np.ptp(t.parts["scale"]) == 0 for t in made)
    return found._replace(scheme=found.scheme._replace(whole=whole))
