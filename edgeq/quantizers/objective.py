"""What the algorithms make small: the error of a layer's output,

    ‖(W - Ŵ)X‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ)        H = X Xᵀ

Each column of X is an input that the layer had while the model read a text. Only H is kept of them, however
long the text was.
"""

import numpy as np


def error(w: np.ndarray, coded: np.ndarray, h: np.ndarray) -> float:
    """‖(W - Ŵ)X‖² / ‖WX‖² of weights and what became of them, both (rows, cols), and h (cols, cols)."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    left = w - coded
    return float(np.vdot(left @ h, left) / np.vdot(w @ h, w))


def of_weights(w: np.ndarray, coded: np.ndarray) -> float:
    """‖W - Ŵ‖² / ‖W‖², which is that error where inputs are alike and independent."""
    w = w.astype(np.float64)
    left = w - coded
    return float(np.vdot(left, left) / np.vdot(w, w))


def damped(h: np.ndarray, damp: float) -> np.ndarray:
    """H float64 with `damp` times the mean of its diagonal added to it.

    An input that was always zero has only that on its diagonal, and nothing beside it: its column takes no
    part in what happens to the others, and is rounded.
    """
    h = np.array(h, np.float64)
    diagonal = np.diagonal(h)
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(f"a Hessian of shape {h.shape}, expected a square one")
    if not np.isfinite(h).all() or (diagonal < 0).any():
        raise ValueError("the Hessian has entries that are no finite numbers, or negative squares")
    if not diagonal.any():
        raise ValueError("all inputs were zero. Calibrate with a text that the model can read")
    h[np.diag_indices_from(h)] += damp * diagonal.mean()
    return h


def toward(w: np.ndarray, h: np.ndarray, drift: np.ndarray, damp: float) -> np.ndarray:
    """Weights float32 (rows, cols) that make of inputs X what w makes of X̃, as far as any can.

    h, drift : float64 (cols, cols), XXᵀ and (X̃ - X)Xᵀ.

    ‖W X̃ - Ŵ X‖² is ‖(W + W (X̃ - X)Xᵀ H⁻¹ - Ŵ)X‖² and something that no Ŵ changes.
    """
    try:
        return (w + np.linalg.solve(damped(h, damp), (w.astype(np.float64) @ drift).T).T).astype(np.float32)
    except np.linalg.LinAlgError as e:
        raise undecided(damp) from e


def undecided(damp: float) -> ValueError:
    """What to say where H is not positive definite."""
    return ValueError(
        f"the Hessian is not positive definite with damping {damp:g}: calibrate with more text, or damp more"
    )
