#!/usr/bin/env python3
"""Gradients of the tiny models of tests/golden/arch, as torch computes them: tests/golden/gradients.json.

    python tools/make_train_goldens.py        # where torch and transformers are installed

The loss is the mean cross-entropy of the golden ids, in float64. Of each weight's gradient the golden holds
its norm, and its products with two fixed waves: an element that is wrong or in a wrong place shows in them.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def prints(gradient: np.ndarray) -> list[float]:
    """Norm, and products with two waves."""
    g, at = gradient.reshape(-1), np.arange(gradient.size)
    return [float(np.linalg.norm(g)), float(g @ np.cos(at)), float(g @ np.cos(0.1 * at))]


def main() -> None:
    """Write the losses and what is left of the gradients."""
    found = {"maker": f"torch {torch.__version__}, transformers {transformers.__version__}"}
    for folder in sorted(p for p in (GOLDEN / "arch").iterdir() if p.is_dir()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        ids = torch.tensor(np.load(folder / "golden.npz")["ids"].astype(np.int64))
        logits = model(ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
        loss.backward()
        gradients = {n: prints(p.grad.numpy()) for n, p in model.named_parameters()}
        found[folder.name] = {"loss": loss.item(), "gradients": gradients}
        print(folder.name, loss.item(), len(gradients))
    (GOLDEN / "gradients.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
