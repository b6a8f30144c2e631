#!/usr/bin/env python3
"""Make tests/golden/nano.json: what llama.cpp says of the models in models/.

    python tools/make_nano_goldens.py

where llama-cpp-python is installed. For each file: the ids of a text, the negative log-likelihood of each
after the first, and what follows a beginning when the likeliest token is always taken.
"""

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

ROOT = Path(__file__).parents[1]
TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her "
    'dog. One day, she saw a big red ball. "Look, Mom!" she said. "Can I play with it?"'
)
BEGINNING = "Once upon a time, there was a little"
TOKENS = 40


def told(path: Path) -> dict[str, Any]:
    """What llama.cpp says of a model."""
    llm = llama_cpp.Llama(str(path), logits_all=True, verbose=False)
    ids = llm.tokenize(TEXT.encode())
    llm.eval(ids)
    logits = llm.scores[: len(ids) - 1].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    answer = llm.create_completion(BEGINNING, max_tokens=TOKENS, temperature=0)
    return {
        "ids": ids,
        "nll": (-logs[np.arange(len(ids) - 1), ids[1:]]).round(5).tolist(),
        "answer": answer["choices"][0]["text"],
    }


def main() -> None:
    """Write the file."""
    made: dict[str, Any] = {"text": TEXT, "beginning": BEGINNING, "tokens": TOKENS}
    for path in sorted((ROOT / "models").glob("*.gguf")):
        made[path.stem] = told(path)
    out = ROOT / "tests" / "golden" / "nano.json"
    out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
