"""Make tests/golden/perplexity.json: perplexities and KL divergences as Transformers and torch compute them.

    python tools/make_perplexity_goldens.py DATA SmolLM2-135M-Instruct.Q4_1.gguf

where torch, transformers, accelerate, gguf and sentencepiece are installed. DATA holds stories260k/ (a Llama
of 260,000 parameters) and text/ (wiki.test.raw, tinystories.txt). Both models compute in float32, SmolLM2
from dequantized weights; what follows the logits is float64. The base of stories260k is itself with the lower
19 bits of all its matrices' numbers cleared, which leaves 4 of the 23 bits of the fraction. Means,
covariances and their errors are written as llama-perplexity writes them.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parents[1] / "tests" / "golden" / "perplexity.json"
CHARACTERS = 40_000  # of a text that are tokenized


def windows(
    ids: list[int], protocol: str, ctx: int, chunks: int, bos: int | None
) -> tuple[torch.Tensor, int]:
    """Token ids (chunks, ctx), and the first position that is scored."""
    if bos is not None:
        ids = [bos, *ids]
    cut = torch.tensor(ids[: ctx * chunks]).reshape(chunks, ctx)
    if protocol == "gptq":
        return cut, 1
    if bos is not None:
        cut[:, 0] = bos
    return cut, ctx // 2 + 1


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: torch.Tensor, first: int) -> torch.Tensor:
    """ln p of all tokens at the scored places, float64 (chunks * scored, vocab)."""
    chunks = [model(window[None], use_cache=False).logits[0, first - 1 : -1] for window in ids]
    return torch.log_softmax(torch.cat(chunks).double(), dim=-1)


def mean(x: torch.Tensor) -> tuple[float, float]:
    """Mean and its error."""
    m = x.mean()
    return m.item(), ((x.square().mean() - m.square()) / (len(x) - 1)).sqrt().item()


def alone(log_p: torch.Tensor, targets: torch.Tensor) -> dict[str, tuple[float, float | None]]:
    """Perplexity."""
    nll, error = mean(-log_p.gather(1, targets[:, None])[:, 0])
    return {"ppl": (math.exp(nll), math.exp(nll) * error)}


def against(log_p: torch.Tensor, log_base: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Every measure that llama-perplexity prints."""
    nll, nll_base = (-x.gather(1, targets[:, None])[:, 0] for x in (log_p, log_base))
    (m, error), (m_base, error_base) = mean(nll), mean(nll_base)
    covariance = ((nll * nll_base).mean() - nll.mean() * nll_base.mean()).item() / (len(nll) - 1)
    ppl, base = math.exp(m), math.exp(m_base)
    log_ratio_error = math.sqrt(error**2 + error_base**2 - 2 * covariance)
    kld = torch.nn.functional.kl_div(log_p, log_base, reduction="none", log_target=True).sum(dim=1)
    dp = (-nll).exp() - (-nll_base).exp()
    square, square_error = mean(dp.square())
    same = (log_p.argmax(dim=1) == log_base.argmax(dim=1)).double().mean().item()
    quantiles = torch.quantile(kld, torch.tensor([0.999, 0.99, 0.95, 0.9], dtype=torch.float64)).tolist()
    return alone(log_p, targets) | {
        "ppl_base": (base, base * error_base),
        "ppl_correlation": (covariance / (error * error_base), None),
        "ln_ppl_ratio": (m - m_base, log_ratio_error),
        "ppl_ratio": (ppl / base, ppl / base * log_ratio_error),
        "ppl_difference": (
            ppl - base,
            math.sqrt((ppl * error) ** 2 + (base * error_base) ** 2 - 2 * ppl * base * covariance),
        ),
        "kld_mean": mean(kld),
        "kld_maximum": (kld.max().item(), None),
        **{f"kld_{p}": (q, None) for p, q in zip(("99.9", "99", "95", "90"), quantiles, strict=True)},
        "kld_median": (torch.quantile(kld, 0.5).item(), None),
        "dp_mean": mean(dp),
        "dp_rms": (math.sqrt(square), square_error / (2 * math.sqrt(square))),
        "same_top": (same, math.sqrt(same * (1 - same) / (len(kld) - 1))),
    }


def main(data: Path, gguf: Path) -> None:
    """Write the file."""
    transformers.utils.logging.disable_progress_bar()
    cases = []

    def case(model: str, text: str, protocol: str, ctx: int, chunks: int, found: dict[str, Any]) -> None:
        print(model, protocol, found, flush=True)
        cases.append(
            {
                "model": model,
                "text": text,
                "text_sha256": hashlib.sha256((data / "text" / text).read_bytes()).hexdigest(),
                "protocol": protocol,
                "ctx": ctx,
                "chunks": chunks,
                "estimates": found,
            }
        )

    def read(name: str, protocol: str) -> str:
        text = (data / "text" / name).read_bytes().decode()[:CHARACTERS]
        if protocol == "llama.cpp":
            return text
        # rows as those of the data set wikitext-2-raw-v1
        return "\n\n".join(f"{row}\n" if row.strip() else "" for row in text.split("\n"))

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = tokenizer(read("wiki.test.raw", "llama.cpp"), add_special_tokens=False).input_ids
    cut, first = windows(ids, "llama.cpp", 512, 2, None)
    found = alone(log_probabilities(model, cut, first), cut[:, first:].flatten())
    case("smollm2", "wiki.test.raw", "llama.cpp", 512, 2, found)

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(data / "stories260k" / "tok512.model"))
    models = [
        AutoModelForCausalLM.from_pretrained(data / "stories260k", dtype=torch.float32).eval()
        for _ in range(2)
    ]
    for w in models[1].parameters():
        if w.ndim == 2:
            w.data = (w.data.view(torch.int32) & -(1 << 19)).view(torch.float32)
    for protocol in ("llama.cpp", "gptq"):
        ids = pieces.encode(read("tinystories.txt", protocol))
        cut, first = windows(ids, protocol, 128, 6, pieces.bos_id())
        logs = [log_probabilities(m, cut, first) for m in models]
        found = against(*logs, cut[:, first:].flatten())
        case("stories260k", "tinystories.txt", protocol, 128, 6, found)

    maker = f"transformers {transformers.__version__}, torch {torch.__version__}, CPU"
    OUT.write_text(json.dumps({"maker": maker, "characters": CHARACTERS, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
