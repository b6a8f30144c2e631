"""Make tests/golden/arch: tiny random models of each architecture, and Transformers' logits for them.

    python tools/make_arch_goldens.py        # where torch, transformers, safetensors and numpy are installed

A folder is a Hugging Face checkpoint with its answer:

    config.json         in the spelling of Transformers 4, which most published checkpoints have
    config-v5.json      the same model in the spelling of Transformers 5
    model.safetensors   float32; all weights are exact in bfloat16, so the answer also holds for a BF16 copy
    golden.npz          ids int32 (48,), logits float32 (48, vocab), maker: the versions that computed them

The models are small and awkward on purpose: groups of 2, 3, 4 and 5 heads, head sizes other than dim / heads,
norm gains away from 1, biases away from 0. MISTAKES lists config changes that a reader could make unaware;
the tool stops if a golden would not show one of them.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "arch"
TOKENS, VOCAB = 48, 128
NOTICED = 0.02  # least max |Δlogit| of a mistake, far above any rounding error


def config(
    model_type: str, family: str, dim: int, ffn: int, layers: int, heads: int, kv_heads: int, **own: Any
) -> dict[str, Any]:
    """A config.json, as somebody would publish it."""
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": model_type,
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **own,
    }


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # one pair of dimensions unscaled, one between, the others scaled
}

LOCAL, GLOBAL = "sliding_attention", "full_attention"

MODELS = {
    "llama": config(
        "llama", "Llama", 64, 96, 2, 4, 2,
        hidden_act="silu", rms_norm_eps=1e-5, rope_theta=50000.0, tie_word_embeddings=False,
    ),
    "llama-3": config(
        "llama", "Llama", 72, 80, 2, 6, 2, head_dim=16, rope_scaling=LLAMA3,
        hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
    ),
    "llama-biases": config(
        "llama", "Llama", 64, 64, 2, 4, 1, attention_bias=True, mlp_bias=True,
        hidden_act="silu", rms_norm_eps=1e-2, rope_theta=10000.0, tie_word_embeddings=True,
    ),
    "mistral": config(
        "mistral", "Mistral", 64, 64, 2, 4, 1, sliding_window=16,
        hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
    ),
    "qwen2": config(
        "qwen2", "Qwen2", 80, 64, 2, 5, 1, use_sliding_window=False, sliding_window=16, max_window_layers=1,
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True,
    ),
    "qwen3": config(
        "qwen3", "Qwen3", 64, 64, 2, 4, 1, head_dim=32,
        hidden_act="silu", rms_norm_eps=1e-2, rope_theta=1000000.0, tie_word_embeddings=True,
    ),
    "gemma3": config(
        "gemma3_text", "Gemma3", 72, 64, 4, 3, 1, head_dim=16, query_pre_attn_scalar=24,
        sliding_window=16, layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL],
        rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0},
        hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-2, tie_word_embeddings=True,
    ),
}  # fmt: skip

MISTAKES: dict[str, list[dict[str, Any]]] = {
    "llama": [{"rope_theta": 10000.0}],
    "llama-3": [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 2.0}},
    ],
    "llama-biases": [{"attention_bias": False}, {"mlp_bias": False}, {"rms_norm_eps": 1e-5}],
    "mistral": [{"sliding_window": None}, {"sliding_window": 15}, {"sliding_window": 17}],
    "qwen2": [{"rope_theta": 10000.0}, {"use_sliding_window": True}],
    "qwen3": [{"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}],
    "gemma3": [
        {"query_pre_attn_scalar": 16},
        {"sliding_window": 15},
        {"sliding_window": 17},
        {"layer_types": [GLOBAL] * 4},
        {"rope_theta": 10000.0},
        {"rope_local_base_freq": 1000000.0},
        {"rope_scaling": None},
        {"rms_norm_eps": 1e-6},
        {"hidden_activation": "silu"},
    ],
}


def random_weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near 1 and spread the logits; without a tied head, as in checkpoints."""
    rng = torch.Generator().manual_seed(seed)
    gain_around = 0.0 if "gemma" in model.config.model_type else 1.0  # Gemma's norms multiply by 1 + weight
    weights = {}
    for name, w in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        x = torch.randn(w.shape, generator=rng)
        if name.endswith("bias"):
            x *= 0.4
        elif w.ndim == 1:
            x = gain_around + 0.3 * x.clamp(-2, 2)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            x *= 1.5 * w.shape[1] ** -0.5  # sharp attention, so that positions matter
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            x *= 2.0 * w.shape[1] ** -0.5
        else:
            x *= w.shape[1] ** -0.5
        weights[name] = x.to(torch.bfloat16).to(torch.float32)
    return weights


@torch.no_grad()
def run(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocab), in the model's dtype."""
    return model.eval()(torch.from_numpy(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy()


def build(fields: dict[str, Any]) -> torch.nn.Module:
    """The model of a config.json's fields, its weights not set."""
    settings = AutoConfig.for_model(**deepcopy(fields))  # Transformers writes into nested dictionaries
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="eager")


def make(name: str, fields: dict[str, Any], seed: int, maker: str) -> None:
    """Write one folder."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(seed).integers(3, VOCAB, TOKENS, dtype=np.int32)
    model = build(fields)
    weights = random_weights(model, seed)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    model.config.architectures = fields["architectures"]
    (folder / "config-v5.json").write_text(model.config.to_json_string())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(loading.values()):
        raise SystemExit(f"{name}: Transformers does not load what was written: {loading}")
    logits = run(model, ids)
    np.savez(folder / "golden.npz", ids=ids, logits=logits, maker=maker)

    rounding = np.abs(run(model.double(), ids) - logits).max()
    print(f"{name}: standard deviation of the logits {logits.std():.2f}, rounding error {rounding:.1g}")
    for mistake in MISTAKES[name]:
        other = build({**fields, **mistake})
        other.load_state_dict(weights, strict=False)
        seen = np.abs(run(other, ids) - logits).max()
        print(f"    {mistake}: max |Δlogit| {seen:.3g}")
        if seen < NOTICED:
            raise SystemExit(f"{name} does not show {mistake}")


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    maker = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU"
    for seed, (name, fields) in enumerate(MODELS.items()):
        make(name, fields, seed, maker)
    (FOLDER / "README.md").write_text(
        "# Tiny random models and their logits\n\n"
        f"Made by `python tools/make_arch_goldens.py` with {maker}.\n"
        "The tool's docstring says what the files are.\n"
    )
    print(f"{sum(f.stat().st_size for f in FOLDER.rglob('*.*')) / 1e6:.2f} MB in {FOLDER}")


if __name__ == "__main__":
    main()
