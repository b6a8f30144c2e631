"""Training an adapter for a model, or the model itself for a format: from names of files to files."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .. import arch, catalog, files, formats, tokenizer
from ..errors import EdgeqError
from ..kernels.encode import choose as nearest
from ..quantizers.mix import FLOATS
from ..tensor import Tensor
from . import adapter, data, lora, merge, picture, qat
from .backend import Network
from .loop import Loop, Options, Point, Progress, checkpoints, likelihood
from .lora import Settings

DEFAULT = Settings()
INTEGERS = ("i8", "i4", "i3", "i2", "ternary", "binary")  # which a folder holds, with a scale a row


class Outcome(NamedTuple):
    """What became of a run: the folder with the adapter, or the model, and a Point for each step."""

    path: Path
    curve: list[Point]


def train_lora(
    model: str | os.PathLike[str],
    data_file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    settings: Settings = DEFAULT,
    length: int = 256,
    epochs: float = 1.0,
    steps: int | None = None,
    hold: bool = True,
    again: bool = False,
    resume: bool = False,
    teacher: str | os.PathLike[str] | None = None,
    chat_template: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Train a LoRA adapter; the model, quantized or not, stays as it is.

    Parameters
    ----------
    model : a name of the catalog, a GGUF file, or a Hugging Face folder.
    data_file : .txt, or .jsonl with prompt and completion, or messages.
    folder : for the adapter, as PEFT has it, the curve of losses, and checkpoints.
    settings : of the adapter.
    length : tokens of a sequence, at most.
    epochs, steps : how often the examples are seen, or how many steps are taken.
    hold : keep the model's weights decoded: faster, but 4 bytes for each.
    again : compute what is in layers a second time instead of keeping it: less memory for long sequences.
    resume : go on from the latest checkpoint in the folder.
    teacher : a model of the same vocabulary; learn what it says, instead of the data: what a base of few bits
        has lost comes back (HQQ+).
    chat_template : instead of the model's own.
    progress : called with (stage, done, total, what was found).
    options : those of `loop.Options`.
    """
    path, folder = catalog.resolve(model, progress), Path(folder)
    meta, tensors = files.read(path)
    order, chosen = _prepared(path, meta, Path(data_file), chat_template, length, epochs, steps, options)
    _check_folder(folder, resume)
    network = Network(
        _without_words(meta), tensors, path, hold=hold, again=again, progress=progress, release=files.release
    )
    learned, dropout = lora.attach(network, settings, chosen.seed)
    master = None if teacher is None else _teacher(teacher, network, progress)

    def begin(step: int, turn: int, batch: data.Batch) -> None:
        dropout.key = (step, turn)
        if master is not None:
            master.begin(batch)

    def saved() -> None:
        made = lora.adapter_of(learned, settings)
        adapter.write_peft(folder, made, settings, network.module, network.config, str(model))
        write_curve(loop)

    about = asdict(settings) | {"teacher": teacher and str(teacher)}
    loop = Loop(network, learned, order, chosen, folder, begin=begin, loss=master or likelihood, about=about)
    if resume:
        loop.resume()
    loop.run(progress, saved)
    return Outcome(folder, loop.curve)


def train_quantized(
    model: str | os.PathLike[str],
    format: str,
    data_file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    mean: bool = False,
    lsq: bool = False,
    activations: bool = False,
    distill: bool = False,
    length: int = 256,
    epochs: float = 1.0,
    steps: int | None = None,
    again: bool = False,
    resume: bool = False,
    chat_template: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Train the layers of a model for the format that they will be stored in; writes FOLDER/model.gguf, or a
    Hugging Face folder FOLDER/model for integers, of which GGUF has no type.

    Parameters
    ----------
    model, data_file, length, epochs, steps, again, resume, chat_template, progress, options : as in
        `train_lora`.
    format : of the layers' matrices, such as "q4_0" or "tq2_0"; "ternary" and "binary", with a scale a row,
        are written as integers of 2 bits.
    folder : for the model, the curve of losses, and checkpoints.
    mean, lsq, activations : see `qat`: scales that are mean magnitudes, scales that learn, inputs of 8 bits.
    distill : learn what the model said before, instead of the text.
    """
    if not (integers := format in INTEGERS) and formats.get(format).GGML is None:
        raise ValueError(f"{format} is neither a type of GGUF's nor one of {', '.join(INTEGERS)}")
    if mean and format not in ("ternary", "tq1_0", "tq2_0"):
        raise ValueError(f"scales that are mean magnitudes are for ternary types, not for {format}")
    path, folder = catalog.resolve(model, progress), Path(folder)
    meta, tensors = files.read(path)
    order, chosen = _prepared(path, meta, Path(data_file), chat_template, length, epochs, steps, options)
    _check_folder(folder, resume)
    meta = _without_words(meta)
    network = Network(
        meta, tensors, path, trained=lambda name: name.startswith("blk."), again=again, progress=progress
    )
    for linear in network.linears():
        if integers and linear.cols % 32:
            raise EdgeqError(f"{linear.names[0]} has {linear.cols} columns, and folders take multiples of 32")
    learned = network.parameters | qat.attach(
        network, format, choose=qat.mean if mean else nearest, steps=lsq, activations=activations
    )
    teacher = qat.Teacher(Network(meta, tensors, path)) if distill else None

    def begin(step: int, turn: int, batch: data.Batch) -> None:
        if teacher is not None:
            teacher.begin(batch)

    about = dict(format=format, mean=mean, lsq=lsq, activations=activations, distill=distill)
    loop = Loop(network, learned, order, chosen, folder, begin=begin, loss=teacher or likelihood, about=about)
    if resume:
        loop.resume()
    loop.run(progress, lambda: write_curve(loop))
    made, out = qat.exported(network), folder / ("model" if integers else "model.gguf")
    halves: dict[str, Tensor] = {}
    if integers:
        made = {name: qat.as_integers(t, activations=activations) for name, t in made.items()}
        others = arch.identify(meta, tensors, path)[2].items()
        # quantized weights beside integers, which folders have as floats only
        halves = {name: t for name, t in others if name not in made and t.format not in FLOATS}
        shutil.rmtree(out, ignore_errors=True)
    merge.write(path, made | halves, dict.fromkeys(halves, "f16"), out, progress=progress)
    return Outcome(out, loop.curve)


def write_curve(loop: Loop) -> None:
    """The losses of a run, as numbers and as a picture."""
    loop.write_curve(loop.folder / "loss.csv")
    picture.write(loop.folder / "loss.png", [point.loss for point in loop.curve])


def _teacher(model: str | os.PathLike[str], student: Network, progress: Progress | None) -> qat.Teacher:
    """What a model says, as a loss for another of as many tokens."""
    path = catalog.resolve(model, progress)
    meta, tensors = files.read(path)
    network = Network(_without_words(meta), tensors, path, progress=progress, release=files.release)
    if network.config.vocab_size != student.config.vocab_size:
        sizes = network.config.vocab_size, student.config.vocab_size
        raise EdgeqError(f"{model} has a vocabulary of {sizes[0]} tokens, the model one of {sizes[1]}")
    return qat.Teacher(network)


def _prepared(
    path: Path,
    meta: dict[str, Any],
    data_file: Path,
    chat_template: str | None,
    length: int,
    epochs: float,
    steps: int | None,
    options: dict[str, Any],
) -> tuple[data.Order, Options]:
    """The batches of a run, and its options."""
    examples = _examples(path, meta, data_file, chat_template, length)
    order = data.Order(examples, options.get("batch", 1), options.get("seed", 0))
    if steps is None:
        steps = max(1, round(epochs * order.epoch / options.get("accumulate", 1)))
    return order, Options(steps=steps, **options)


def _check_folder(folder: Path, resume: bool) -> None:
    """Make the folder; EdgeqError if it has a run that nobody asked to go on with."""
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoints(folder) and not resume:
        raise EdgeqError(
            f"{folder} has checkpoints of a run: go on with it (--resume), or name another folder"
        )


def _without_words(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata without the vocabulary, which is large and done with."""
    return {key: value for key, value in meta.items() if not key.startswith("tokenizer.")}


def _examples(
    path: Path, meta: dict[str, Any], data_file: Path, chat_template: str | None, length: int
) -> list[data.Example]:
    """The examples of a file."""
    words = tokenizer.from_huggingface(path) if path.is_dir() else tokenizer.from_gguf(meta, path)
    return data.read(data_file, words, chat_template or words.chat_template, length)
