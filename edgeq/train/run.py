"""Training an adapter for a model: from names of files to files."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from .. import catalog, files, tokenizer
from ..errors import EdgeqError
from . import adapter, data, lora
from .backend import Network
from .loop import Loop, Options, Point, Progress, checkpoints
from .lora import Settings

DEFAULT = Settings()


class Outcome(NamedTuple):
    """What became of a run: the folder with the adapter, and a Point for each step."""

    folder: Path
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
    chat_template : instead of the model's own.
    progress : called with (stage, done, total, what was found).
    options : those of `loop.Options`.
    """
    path, folder = catalog.resolve(model, progress), Path(folder)
    meta, tensors = files.read(path)
    examples = _examples(path, meta, Path(data_file), chat_template, length)
    meta = {key: value for key, value in meta.items() if not key.startswith("tokenizer.")}
    batch, accumulate = options.get("batch", 1), options.get("accumulate", 1)
    order = data.Order(examples, batch, options.get("seed", 0))
    if steps is None:
        steps = max(1, round(epochs * order.epoch / accumulate))
    chosen = Options(steps=steps, **options)
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoints(folder) and not resume:
        raise EdgeqError(
            f"{folder} has checkpoints of a run: go on with it (--resume), or name another folder"
        )
    network = Network(meta, tensors, path, hold=hold, again=again, progress=progress, release=files.release)
    learned, dropout = lora.attach(network, settings, chosen.seed)

    def begin(step: int, turn: int) -> None:
        dropout.key = (step, turn)

    loop = Loop(network, learned, order, chosen, folder, begin=begin)
    if resume:
        loop.resume()

    def saved() -> None:
        made = lora.adapter_of(learned, settings)
        adapter.write_peft(folder, made, settings, network.module, network.config, str(model))
        loop.write_curve(folder / "loss.csv")

    loop.run(progress, saved)
    return Outcome(folder, loop.curve)


def _examples(
    path: Path, meta: dict[str, Any], data_file: Path, chat_template: str | None, length: int
) -> list[data.Example]:
    """The examples of a file; the tokenizer, which is large, is needed no longer."""
    words = tokenizer.from_huggingface(path) if path.is_dir() else tokenizer.from_gguf(meta, path)
    return data.read(data_file, words, chat_template or words.chat_template, length)
