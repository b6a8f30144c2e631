"""Algorithms on a whole model: layer by layer, each seeing what became of those before it.

A method makes a plan of a plan: it has the same names and formats, and matrices that are encoded already
(gptq, hqq), or changed before they will be (awq). So methods follow each other: awq+gptq.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import arch, calibrate, formats, kernels, tokenizer
from ..calibrate import Held, Inputs
from ..convert.source import plain
from ..convert.stream import Recoding, in_order
from ..evaluate.protocol import cut
from ..tensor import Tensor
from .aqlm import aqlm as aqlm_of_layer
from .awq import clip, rounded, search_scale
from .eetq import eetq_onto
from .gptq import costs
from .gptq import gptq as gptq_of_layer
from .hqq import Solver, has_offsets, hqq_onto
from .kept import Kept, begin, identity
from .objective import error, of_weights, toward
from .target import target

if TYPE_CHECKING:
    from . import Plan

Progress = Callable[[str, int, int], None]
Found = Callable[[str, float], None]
# methods with a format of their own, not of GGUF files
FOLDERS = ("aqlm", "static", "dynamic", "ternary", "binary")
METHODS = ("rtn", "gptq", "hqq", "awq", "eetq", "smooth", *FOLDERS)
LONG = ("gptq", "awq", "aqlm")  # which keep what they have made, if they are told where

# Who makes the inputs of a matrix: a norm by its gains, another matrix by its rows.
MAKERS = {"attn_q": "attn_norm", "ffn_gate": "ffn_norm", "attn_output": "attn_v", "ffn_down": "ffn_up"}
CLIPPED = ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")  # q and k meet in a product


class Calibration(NamedTuple):
    """A text, and how it is read.

    Attributes
    ----------
    text : None lets the model make one up, if a method needs it: see `calibrate.sampled`.
    seed : for that.
    chunks, ctx : how many pieces of it, and their tokens.
    backend, threads : that compute.
    """

    text: str | None = None
    chunks: int = 128
    ctx: int = 512
    seed: int = 0
    backend: str = "numba"
    threads: int | None = None


def apply(
    method: str,
    plan: "Plan",
    calibration: Calibration,
    progress: Progress | None = None,
    found: Found | None = None,
    keep: Path | None = None,
    **options: Any,
) -> "Plan":
    """The plan after a method, or after several, ``"awq+gptq"``; each takes those options that it has.

    found : called with the name of each matrix that was encoded, and its ‖(W - Ŵ)X‖² / ‖WX‖²; by hqq, which
        looks at no X, with ‖W - Ŵ‖² / ‖W‖².
    keep : a folder for what long methods have made so far; if it is there already, they go on from it.
    """
    known = check(method)
    unknown = set(options) - {key for keys in known.values() for key in keys}
    if unknown:
        has = ", ".join(sorted(key for keys in known.values() for key in keys))
        raise ValueError(f"{method} has no option {', '.join(sorted(unknown))}; it has {has}")
    names = method.lower().split("+")
    if keep and any(name in LONG for name in names):
        begin(keep, identity(plan, calibration, method.lower(), options) | {"report": found is not None})
    for name, then in zip(names, [*names[1:], ""], strict=True):
        own = {key: value for key, value in options.items() if key in known[name]}
        if name == "awq":
            own = {"feedback": then == "gptq"} | own
        if name not in LONG:
            plan = _method(name)(plan, calibration, progress, found, **own)
            continue
        kept = Kept(keep and keep / name)
        plan = _method(name)(plan, calibration, progress, found, kept, **own)
        if found:
            for matrix, lost in kept.lost.items():
                found(matrix, lost)
    return plan


def _method(name: str) -> Callable[..., "Plan"]:
    """A method of this file, or one that has its own."""
    return globals().get(name) or getattr(importlib.import_module(f"{__package__}.{name}"), name)


def check(method: str) -> dict[str, dict[str, inspect.Parameter]]:
    """The options of each method in ``"awq+gptq"``; ValueError for a name that is none."""
    known = {}
    for name in method.lower().split("+"):
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; edgeq has {', '.join(METHODS)}")
        parameters = inspect.signature(_method(name)).parameters
        known[name] = {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    return known


def rtn(
    plan: "Plan", calibration: Calibration, progress: Progress | None = None, found: Found | None = None
) -> "Plan":
    """The plan as it is: each weight gets the nearest code, on the grid that its format's search finds."""
    return plan


def gptq(
    plan: "Plan",
    calibration: Calibration,
    progress: Progress | None,
    found: Found | None,
    kept: Kept,
    *,
    damp: float = 0.01,
    order: str | None = "groups",
    static: bool = False,
    sweeps: int = 0,
    asymmetric: float = 0.0,
) -> "Plan":
    """All matrices of the layers as `gptq.gptq` encodes them, which has the options but for the last.

    asymmetric : how much of W X̃ - W X each layer makes up for, X̃ its inputs before anything was quantized: 0
        is GPTQ, 1 looks at ‖W X̃ - Ŵ X‖² instead. Sources: Li et al., GPTAQ, arXiv 2504.02692; Arai and
        Ichikawa, Quantization Error Propagation, arXiv 2504.09629, which has the part.
    """
    wanted, threads = to_encode(plan), calibration.threads or kernels.cores()
    for linear, inputs in inputs_of(plan, calibration, progress, kept, drift=asymmetric > 0):
        h, matrices = inputs.hessian, {name: w for name, w in linear.parts() if name in wanted}
        made, lost = [], {}
        for format in dict.fromkeys(wanted[name] for name in matrices):
            names = [name for name in matrices if wanted[name] == format]
            w = first = np.concatenate([matrices[name] for name in names])
            if inputs.drift is not None:
                w = toward(w, h, asymmetric * inputs.drift, damp)
            to = target(format, w.shape[1])
            codes, grid = gptq_of_layer(
                w, h, to, damp=damp, order=order, static=static, sweeps=sweeps, threads=threads
            )
            whole, start = formats.pack(format, codes, grid), 0
            for name in names:
                rows = np.arange(start, start := start + len(matrices[name]))
                made.append(formats.take(whole, rows)._replace(name=name))
                coded = formats.dequantize(made[-1])
                if found:
                    lost[name] = error(first[rows], coded, h)
                matrices[name][:] = coded
        kept.add(made, lost)
    return put(plan, kept.tensors)


def hqq(
    plan: "Plan",
    calibration: Calibration,
    progress: Progress | None = None,
    found: Found | None = None,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    rounds: int = 20,
) -> "Plan":
    """All matrices of formats with offsets as `hqq.hqq_onto` encodes them; the others as ever."""
    todo = {name: format for name, format in to_encode(plan).items() if has_offsets(format)}
    solver, compiled = Solver(p, beta, kappa, rounds), calibration.backend == "numba"

    def encode(r: Recoding) -> tuple[Tensor, float]:
        w = formats.dequantize(r.arranged)
        codes, grid = hqq_onto(r.format, w, solver=solver, compiled=compiled)
        coded = formats.pack(r.format, codes, grid)._replace(name=r.tensor.name)
        return coded, of_weights(w, formats.dequantize(coded)) if found else 0

    jobs = [partial(encode, r) for r in plan.recodings if r.tensor.name in todo]
    made: dict[str, Tensor] = {}
    with closing(in_order(jobs, calibration.threads or kernels.cores())) as results:
        for tensor, lost in results:
            made[tensor.name] = tensor
            if found:
                found(tensor.name, lost)
            if progress:
                progress("matrices", len(made), len(todo))
    return put(plan, made)


def awq(
    plan: "Plan",
    calibration: Calibration,
    progress: Progress | None,
    found: Found | None,
    kept: Kept,
    *,
    clipping: bool = True,
    feedback: bool = False,
    damp: float = 0.01,
) -> "Plan":
    """All layers with the scales and clips that `awq.search_scale` and `awq.clip` find, not yet encoded.

    feedback : look for scales that GPTQ rounds well, with that damping, and clip nothing; "awq+gptq" does.
    """
    wanted, scaled = to_encode(plan), Scaled(plan, kept)
    ops, threads = kernels.backend(calibration.backend), calibration.threads or kernels.cores()
    for linear, inputs in inputs_of(plan, calibration, progress, kept, encoded=False):
        names = [name for name in linear.names if name in wanted]
        if not names:
            continue
        cols = linear.weight.shape[1]
        maker, source = scaled.maker_of(linear.names[0])
        to = target(wanted[names[0]], cols)
        with arch.turn(ops, threads):
            best = search_scale(
                [scaled.weights(name) for name in names],
                inputs.hessian,
                inputs.magnitudes / inputs.count,
                to,
                source,
                costs(inputs.hessian, to, damp, "groups") if feedback else None,
                gram=ops.gram,
                threads=threads,
            )
        of_rows = np.ones(max(source) + 1, np.float32)
        of_rows[source] = best.scale
        scaled.scale(linear.names, maker, source, of_rows)
        h = inputs.hessian / np.outer(best.scale, best.scale)
        for name in names:
            to, before = target(wanted[name], cols), scaled.weights(name)
            if clipping and not feedback and name.rsplit(".", 2)[1] in CLIPPED:
                scaled.made[name] = clip(before, h, to, threads=threads)
            if found:
                scaled.lost[name] = error(before, rounded(scaled.made[name], to), h)
    return scaled.plan()


def eetq(
    plan: "Plan", calibration: Calibration, progress: Progress | None = None, found: Found | None = None
) -> "Plan":
    """All matrices of q8_0 as `eetq.eetq` encodes them, with one scale a row; the others as ever."""
    todo = {name: format for name, format in to_encode(plan).items() if format == "q8_0"}
    made = {}
    for done, (name, w) in enumerate(_weights(plan, todo)):
        made[name] = formats.pack("q8_0", *eetq_onto("q8_0", w))._replace(name=name)
        if progress:
            progress("matrices", done + 1, len(todo))
    return put(plan, made)


def aqlm(
    plan: "Plan",
    calibration: Calibration,
    progress: Progress | None,
    found: Found | None,
    kept: Kept,
    *,
    codebooks: int = 2,
    bits: int = 8,
    group: int = 8,
    beam: int = 16,
    rounds: int = 8,
    damp: float = 0.01,
    seed: int = 0,
    tune: int = 0,
) -> "Plan":
    """All matrices of the layers as `aqlm.aqlm` encodes them, which has the options but for the last,
    whatever their formats in the plan.

    tune : steps in which codebooks and scales of each block learn together afterwards; see `train.codebooks`.
    """
    threads, compiled = calibration.threads or kernels.cores(), calibration.backend == "numba"
    for linear, inputs in inputs_of(plan, calibration, progress, kept):
        made, lost = [], {}
        for name, w in linear.parts():
            with arch.turn(kernels.backend(calibration.backend), threads):
                coded = aqlm_of_layer(
                    w, inputs.hessian, codebooks=codebooks, bits=bits, group=group, beam=beam, rounds=rounds,
                    damp=damp, seed=seed, compiled=compiled,
                )  # fmt: skip
            made.append(formats.get("aqlm").pack(*coded[:3])._replace(name=name))
            decoded = formats.dequantize(made[-1])
            if found:
                lost[name] = error(w, decoded, inputs.hessian)
            w[:] = decoded
        kept.add(made, lost)
    after = put(plan, kept.tensors)
    if tune:
        learn = importlib.import_module("edgeq.train.codebooks").tune
        after = learn(plan, after, calibration, steps=tune, progress=progress)
    return after


class Scaled:
    """Matrices whose columns are scaled, while who makes their inputs divides by as much: the model computes
    what it did.

    Attributes
    ----------
    made, lost : float32 weights of a layer, by name, as they are up to now, and their errors.
    kept : those of other layers, as tensors of the type that they had.
    """

    def __init__(self, plan: "Plan", kept: Kept | None = None) -> None:
        self.before, self.present, self.kept = plan, arranged(plan), kept or Kept()
        self.made: dict[str, np.ndarray] = {}
        self.lost: dict[str, float] = {}

    def weights(self, name: str) -> np.ndarray:
        """Weights, or gains, of a tensor; asking for those of another layer settles the ones before."""
        if not any(_layer(name) == _layer(other) for other in self.made):
            self.settle()
        if name not in self.made:
            tensor = self.kept.tensors.get(name, self.present[name])
            self.made[name] = formats.dequantize(tensor).reshape(tensor.shape)
        return self.made[name]

    def settle(self) -> None:
        """Make tensors of the weights."""
        settled = []
        for name, w in self.made.items():
            old = self.present[name]
            kind = "f16" if old.format == "f16" else "f32"
            data = np.ascontiguousarray(w, np.float16 if kind == "f16" else np.float32)
            settled.append(Tensor(name, kind, old.shape, data.reshape(-1).view(np.uint8)))
        if settled:
            self.kept.add(settled, self.lost)
        self.made, self.lost = {}, {}

    def maker_of(self, name: str) -> tuple[str, np.ndarray]:
        """Who makes the inputs of a matrix, and which of its rows (or gains) makes each: int (cols,)."""
        layer, kind = name.rsplit(".", 2)[:2]
        maker, cols = f"{layer}.{MAKERS[kind]}", self.present[name].cols
        rows = self.present[f"{maker}.weight"].rows
        if rows in (1, cols):
            return maker, np.arange(cols)
        # rows of attn_v: heads of queries that follow each other share one of values
        meta = self.before.meta
        heads = int(np.max(meta[f"{meta['general.architecture']}.attention.head_count"]))
        size = cols // heads
        head, within = np.divmod(np.arange(cols), size)
        return maker, head // (cols // rows) * size + within

    def scale(self, names: Iterable[str], maker: str, source: np.ndarray, s: np.ndarray) -> None:
        """Scale the columns of matrices that share inputs; s float32 (rows of the maker,)."""
        for name in names:
            self.made[name] = self.weights(name) * s[source]
        for name in (f"{maker}.weight", f"{maker}.bias"):
            if name in self.present:
                w = self.weights(name)
                self.made[name] = w / (s[:, None] if w.ndim == 2 else s)

    def plan(self) -> "Plan":
        """The plan with these weights, yet to be encoded."""
        self.settle()
        return put(self.before, self.kept.tensors, encoded=False)


def _layer(name: str) -> str:
    """``"blk.3"`` of ``"blk.3.attn_q.weight"``."""
    return name.rsplit(".", 2)[0]


def to_encode(plan: "Plan", *, everywhere: bool = False) -> dict[str, str]:
    """Format of each matrix that is to be encoded, of the layers or of the whole model."""
    return {
        r.tensor.name: r.format
        for r in plan.recodings
        if (everywhere or r.tensor.name.startswith("blk."))
        and r.format != r.tensor.format
        and (formats.get(r.format).BLOCK > 1 or formats.parts(formats.get(r.format)))
        and len(r.tensor.shape) == 2
    }


def arranged(plan: "Plan") -> dict[str, Tensor]:
    """The tensors as GGUF wants their rows."""
    return {r.tensor.name: r.arranged for r in plan.recodings}


def _weights(plan: "Plan", names: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    for r in plan.recodings:
        if r.tensor.name in names:
            yield r.tensor.name, formats.dequantize(r.arranged)


def inputs_of(
    plan: "Plan",
    calibration: Calibration,
    progress: Progress | None,
    kept: Kept | None = None,
    *,
    encoded: bool = True,
    drift: bool = False,
) -> Iterator[tuple[Held, Inputs]]:
    """`calibrate.walk` through the model of a plan, to the linears that were not made already; those that
    were `encoded` have what they lost.
    """
    c, windows = calibration, windows_of(plan, calibration, progress)
    held = calibrate.held(plain(plan.meta), arranged(plan), plan.source, backend=c.backend, threads=c.threads)
    done = partial((kept or Kept()).settle, encoded=encoded)
    yield from calibrate.walk(held, windows, drift=drift, done=done, progress=progress)


def windows_of(plan: "Plan", calibration: Calibration, progress: Progress | None) -> np.ndarray:
    """Chunks int64 (chunks, ctx) of the text, or of one that the model of the plan makes up."""
    c, tokens = calibration, tokenizer.load(plan.source)
    if c.text is not None:
        return cut(c.text, tokens, "llama.cpp", c.ctx, c.chunks)[1]
    whole = model(plan, c.backend, c.threads)
    return calibrate.sampled(whole, c.chunks, c.ctx, first=tokens.bos_id, seed=c.seed, progress=progress)


def model(plan: "Plan", backend: str = "numba", threads: int | None = None) -> arch.Model:
    """The model of a plan, as far as it is encoded, ready to run."""
    return arch.load(plain(plan.meta), arranged(plan), backend=backend, path=plan.source, threads=threads)


def put(plan: "Plan", made: Mapping[str, Tensor], *, encoded: bool = True) -> "Plan":
    """The plan with other tensors, whose rows are in order: as they will be written, or, not yet encoded, to
    become what the plan says.
    """
    recodings = []
    for r in plan.recodings:
        if (tensor := made.get(r.tensor.name)) is not None:
            r = r._replace(tensor=tensor, format=tensor.format if encoded else r.format, rows=None)
        recodings.append(r)
    return plan._replace(recodings=recodings)
