"""LoRA (arXiv 2106.09685): beside a frozen W, a product of two thin matrices learns.

    y = W x + s B A dropout(x)      A (r, cols), B (rows, r), s = alpha / r, or alpha / √r (arXiv 2312.03732)

A begins random and B zero, so the function is what it was. Which matrices get a pair is told by their names:
Hugging Face's (q_proj), GGUF's (attn_q), or "all-linear" for all but the output matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from . import tape
from .backend import Network
from .tape import Numbers, Var

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = "all-linear"


@dataclass(frozen=True)
class Settings:
    """How an adapter is made; the names and meanings are PEFT's.

    Attributes
    ----------
    r, lora_alpha, use_rslora : rank, and what the scale is made from.
    lora_dropout : share of the inputs that a training step leaves out.
    target_modules : names of the matrices that get a pair.
    bias : which biases learn, too: "none", "lora_only" for those beside a pair, or "all".
    """

    r: int = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    bias: Literal["none", "lora_only", "all"] = "none"

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"r is {self.r} and alpha {self.lora_alpha}, expected positive numbers")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"dropout is {self.lora_dropout}, expected 0 or more, below 1")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias is {self.bias!r}, expected none, lora_only or all")

    @property
    def scale(self) -> float:
        """The factor s."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


class Pair(NamedTuple):
    """The change of a matrix, scale * b @ a. a: float32 (r, cols), b: float32 (rows, r)."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Adapter(NamedTuple):
    """What is added to a model, by GGUF's names of its tensors, with rows in the order of the model's.

    Attributes
    ----------
    pairs : of matrices.
    biases : what takes the place of biases.
    """

    pairs: dict[str, Pair]
    biases: dict[str, np.ndarray]


class Dropout:
    """Which inputs a step leaves out: a matter of the seed, the step, and the place in the network alone.

    key : of the step; None leaves nothing out.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        self.key: tuple[int, ...] | None = None

    def __call__(self, x: Numbers, place: int) -> Numbers:
        if not self.share or self.key is None:
            return x
        rng = np.random.default_rng([self.seed, *self.key, place])
        a = tape.value(x)
        kept = rng.random(a.shape, np.float32) >= self.share
        return tape.mul(x, kept / a.dtype.type(1 - self.share))


class Beside:
    """A pair that learns: x (n, cols) -> what is to be added (n, rows)."""

    def __init__(self, a: Numbers, b: Numbers, scale: float, dropout: Dropout, place: int) -> None:
        self.a, self.b, self.scale = a, b, np.float32(scale)
        self.dropout, self.place = dropout, place

    def __call__(self, x: Numbers) -> Numbers:
        inner = tape.matmul(self.dropout(x, self.place), self.a)
        return tape.matmul(tape.mul(inner, self.scale), self.b)


def module_name(module: ModuleType, tensor: str) -> str:
    """Hugging Face's name of a matrix: blk.0.attn_q.weight is model.layers.0.self_attn.q_proj."""
    if not tensor.startswith("blk."):
        return "lm_head"
    _, layer, kind, _ = tensor.split(".")
    return f"model.layers.{layer}.{module.HF_NAMES[kind]}"


def chosen(targets: Sequence[str], module: ModuleType, tensors: Sequence[str]) -> list[str]:
    """The tensors that targets name; ValueError for a target that names none."""
    names = {t: {t.split(".")[-2], module_name(module, t).split(".")[-1]} for t in tensors}
    known = set[str]().union(*names.values()) | {ALL}
    for target in targets:
        if target not in known:
            raise ValueError(f"no matrix is named {target!r}; the model has {', '.join(sorted(known))}")
    everything = {t for t in tensors if t.startswith("blk.")} if ALL in targets else set()
    return [t for t in tensors if t in everything or names[t] & set(targets)]


def attach(network: Network, settings: Settings, seed: int) -> tuple[dict[str, Var], Dropout]:
    """Put pairs beside the linears of a network; what learns, by name, and the dropout that they share."""
    rng, dropout = np.random.default_rng(seed), Dropout(settings.lora_dropout, seed)
    tied = "token_embd.weight"  # an output matrix that is the embedding, too, gets no pair
    tensors = [name for linear in network.linears() for name in linear.names if name != tied]
    targets = set(chosen(settings.target_modules, network.module, tensors))
    learned: dict[str, Var] = {}
    for linear in network.linears():
        for i, (name, start, rows) in enumerate(zip(linear.names, linear.starts, linear.rows, strict=True)):
            if name in targets:
                bound = linear.cols**-0.5  # as torch begins a linear, and PEFT an A
                a = rng.uniform(-bound, bound, (settings.r, linear.cols)).astype(np.float32)
                learned[f"{name}.lora_a"] = pair_a = Var(a)
                learned[f"{name}.lora_b"] = pair_b = Var(np.zeros((rows, settings.r), np.float32))
                adapter = Beside(pair_a, pair_b, settings.scale, dropout, len(learned))
                linear.adapters.append((start, adapter))
            if linear.biases and (
                settings.bias == "all" or (settings.bias == "lora_only" and name in targets)
            ):
                bias = Var(tape.value(linear.biases[i]).copy())
                learned[name.removesuffix("weight") + "bias"] = linear.biases[i] = bias
    return learned, dropout


def adapter_of(learned: Mapping[str, Var], settings: Settings) -> Adapter:
    """What was learned so far."""
    arrays = {name: var.value for name, var in learned.items()}
    names = [name.removesuffix(".lora_a") for name in arrays if name.endswith(".lora_a")]
    pairs = {n: Pair(arrays[f"{n}.lora_a"], arrays[f"{n}.lora_b"], settings.scale) for n in names}
    return Adapter(pairs, {n: a for n, a in arrays.items() if n.endswith(".bias")})


def put(network: Network, adapter: Adapter) -> None:
    """Put what was learned beside the linears of a network, to go on from there or to compute."""
    still: Any = Dropout(0, 0)
    for linear in network.linears():
        for i, (name, start) in enumerate(zip(linear.names, linear.starts, strict=True)):
            if name in adapter.pairs:
                linear.adapters.append((start, Beside(*adapter.pairs[name], still, 0)))
            if (bias := adapter.biases.get(name.removesuffix("weight") + "bias")) is not None:
                linear.biases[i] = bias
