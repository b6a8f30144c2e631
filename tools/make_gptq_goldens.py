#!/usr/bin/env python3
"""Algorithm 1 of GPTQ (arXiv 2210.17323), written down in torch, in float64: tests/golden/gptq.npz.

    python tools/make_gptq_goldens.py

needs: torch, numpy. No blocks and no tricks: every error goes to all columns behind it at once. Grids cover
the values that a group has when its first column is reached; their scales are rounded to float16.
"""

from pathlib import Path

import numpy as np
import torch

ROWS, COLS, TOKENS, DAMP = 12, 128, 300, 0.01
CASES = [(8, 32, False), (4, 32, False), (4, 64, True), (4, 128, False), (3, 32, True), (2, 32, False)]


def grid(w: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (rows,) of a group's weights (rows, group)."""
    w = w.float()
    if symmetric:
        return (w.abs().amax(1) / (2 ** (bits - 1) - 1)).half(), torch.full((len(w),), 2.0 ** (bits - 1))
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale.half(), torch.round(-low / scale)


def gptq(
    w: torch.Tensor, h: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, ...]:
    """Codes and weights (rows, cols) after quantization."""
    w, coded, codes = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h)).T  # H⁻¹ = UᵀU
    for j in range(w.shape[1]):
        if j % group == 0:
            scale, zero = (v.double() for v in grid(w[:, j : j + group], bits, symmetric))
        codes[:, j] = torch.clamp(torch.round(w[:, j] / scale) + zero, 0, 2**bits - 1)
        coded[:, j] = scale * (codes[:, j] - zero)
        error = (w[:, j] - coded[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] @ u[j, j:][None]
    return codes, coded


def main() -> None:
    """Write the layer, and for each case what becomes of it."""
    torch.manual_seed(0)
    mix = torch.randn(COLS, COLS, dtype=torch.float64) / COLS**0.5 + torch.eye(COLS, dtype=torch.float64) / 2
    x = torch.randn(TOKENS, COLS, dtype=torch.float64) @ mix * torch.randn(COLS, dtype=torch.float64).exp()
    w = (torch.randn(ROWS, COLS) * 0.05).float()
    h = (x.T @ x).float()
    found = {"w": w.numpy(), "h": h.numpy()}
    wd, hd = w.double(), h.double()
    for bits, group, symmetric in CASES:
        codes, coded = gptq(wd, hd, bits, group, symmetric)
        left = wd - coded
        name = f"{bits}-{group}-{'sym' if symmetric else 'asym'}"
        found[f"codes-{name}"] = codes.numpy().astype(np.uint8)
        found[f"error-{name}"] = (((left @ hd) * left).sum() / ((wd @ hd) * wd).sum()).numpy()
        print(name, found[f"error-{name}"])
    np.savez_compressed(Path(__file__).parents[1] / "tests" / "golden" / "gptq.npz", **found)


if __name__ == "__main__":
    main()
