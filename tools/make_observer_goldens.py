#!/usr/bin/env python3
"""Make tests/golden/observers.npz: what PyTorch's observers make of some batches.

    python tools/make_observer_goldens.py tests/golden/observers.npz        needs torch (2.13 made the file)

The batches go from narrow to wide, one of them within what the others reached, so that a histogram has to
move its counts. For each: the ends, the histogram, and scale and zero point of an asymmetric grid of 8 bits.
"""

import sys
import warnings

import numpy as np
import torch
from torch.ao.quantization import observer

BATCHES, ROWS, CHANNELS, BINS = 5, 64, 6, 256


def batches() -> list[np.ndarray]:
    """float32 (ROWS, CHANNELS) each, with heavy tails."""
    rng = np.random.default_rng(5)
    spread = (1, 2.5, 0.5, 7, 1)
    return [(s * rng.standard_t(3, (ROWS, CHANNELS)) + 0.3).astype(np.float32) for s in spread]


def main(path: str) -> None:
    """Write the file."""
    warnings.simplefilter("ignore")
    affine = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine}
    by_channel = {"dtype": torch.quint8, "qscheme": torch.per_channel_affine, "ch_axis": 1}
    found = {f"batch{i}": x for i, x in enumerate(batches())}
    for name, made in {
        "minmax": observer.MinMaxObserver(**affine),
        "moving_average": observer.MovingAverageMinMaxObserver(averaging_constant=0.01, **affine),
        "minmax_channel": observer.PerChannelMinMaxObserver(**by_channel),
        "moving_average_channel": observer.MovingAveragePerChannelMinMaxObserver(
            averaging_constant=0.01, **by_channel
        ),
        "mse": observer.HistogramObserver(bins=BINS, **affine),
    }.items():
        for x in batches():
            made(torch.from_numpy(x))
        scale, zero = made.calculate_qparams()
        found |= {
            f"{name}_low": made.min_val.numpy(),
            f"{name}_high": made.max_val.numpy(),
            f"{name}_scale": scale.numpy(),
            f"{name}_zero": zero.numpy(),
        }
        if name == "mse":
            found[f"{name}_histogram"] = made.histogram.numpy()
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
