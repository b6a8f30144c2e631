#!/usr/bin/env python3
"""Adapters that PEFT trained for the tiny models of tests/golden/arch, with its logits: tests/golden/lora.

    python tools/make_lora_goldens.py             # where torch, transformers and peft are installed
    python tools/make_lora_goldens.py MODEL ADAPTER IDS    # PEFT's logits for ids, such as 1,2,3

The second form writes ADAPTER/logits.npy: what PEFT makes of an adapter that somebody else trained.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CASES = {
    "llama": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "qwen2": dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], bias="all"),
    "llama-biases": dict(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    "gemma3": dict(r=4, lora_alpha=2, use_rslora=True, target_modules="all-linear"),
    "qwen3": dict(
        r=4, lora_alpha=8, target_modules=["k_proj", "gate_proj"],
        rank_pattern={"k_proj": 2}, alpha_pattern={"gate_proj": 3},
    ),
}  # fmt: skip


def load(path: Path) -> torch.nn.Module:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def train(name: str, options: dict) -> None:
    """Some steps on the golden's ids."""
    torch.manual_seed(0)
    source, folder = GOLDEN / "arch" / name, GOLDEN / "lora" / name
    ids = torch.tensor(np.load(source / "golden.npz")["ids"].astype(np.int64))[None]
    model = get_peft_model(load(source), LoraConfig(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(name, loss.item())
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    with torch.no_grad():
        np.save(folder / "logits.npy", model.eval()(ids).logits[0].numpy())


def answer(path: Path, folder: Path, ids: list[int]) -> None:
    """PEFT's logits for an adapter that somebody else made."""
    model = PeftModel.from_pretrained(load(path), folder).eval()
    with torch.no_grad():
        np.save(folder / "logits.npy", model(torch.tensor([ids])).logits[0].numpy())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer(Path(sys.argv[1]), Path(sys.argv[2]), [int(i) for i in sys.argv[3].split(",")])
    else:
        for case, settings in CASES.items():
            train(case, settings)
