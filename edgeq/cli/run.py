"""`edgeq run [MODEL] [PROMPT]`: one answer, as it comes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ._console import printable, progress
from ._model import LOADING, MODEL, SAMPLING, SYSTEM, TEXT_FILE, note_timings, open_model, option, pick, usage

PROMPT = option("-p", "--prompt", metavar="TEXT", help="The prompt; - reads it from stdin.")
FILE = option("-f", "--file", type=TEXT_FILE, help="A file with the prompt.")
RAW = option("--raw", "-no-cnv", is_flag=True, help="Go on with the prompt's text, without a chat template.")


@click.command(params=[MODEL, PROMPT, FILE, SYSTEM, RAW, *LOADING, *SAMPLING])
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
def command(words: tuple[str, ...], prompt: str | None, file: Path | None, raw: bool, **given: Any) -> None:
    """Answer PROMPT with MODEL.

    A single argument is the model if it names one (of the catalog, an address or a path), else the prompt for
    the default model. Without a prompt, stdin is read.
    """
    model, prompt = split_words(words, given["model"], prompt, file)
    text = read_prompt(prompt, file)
    llm = open_model(model, **pick(given, LOADING))
    with llm, progress() as report, usage():
        options = pick(given, SAMPLING) | {"progress": report}
        if not raw and llm.chat_template is not None:
            answer = llm.chat(messages(given["system_prompt"], text), stream=True, **options)
        elif given["system_prompt"]:
            raise click.UsageError("a system prompt needs a chat template: --chat-template")
        else:
            answer = llm.stream(text, **options)
        write(answer)
        if given["verbose"]:
            note_timings(llm)


def split_words(
    words: Sequence[str], model: str | None, prompt: str | None, file: Path | None = None
) -> tuple[str | None, str | None]:
    """Model and prompt, given as options or as words."""
    from .. import catalog

    words = list(words)
    has_prompt = prompt is not None or file is not None
    if model is None and words and (len(words) > 1 or has_prompt or catalog.is_model(words[0])):
        model = words.pop(0)
    if not has_prompt and words:
        prompt = words.pop(0)
    if words:
        raise click.UsageError(f"unexpected {words[0]!r}; put a prompt of several words in quotes")
    return model, prompt


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text: given, in a file, or on stdin; the last newline of a file is no part of it."""
    if prompt is not None and file is not None:
        raise click.UsageError("-p and -f are both given")
    if file is not None:
        prompt = file.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise click.UsageError("there is no prompt: edgeq run MODEL PROMPT (or `edgeq chat` to talk)")
    return prompt


def messages(system: str | None, text: str) -> list[dict[str, str]]:
    """A conversation that begins with a text."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def write(pieces: Any) -> None:
    """Print an answer piece by piece, and end its line."""
    safe = printable if sys.stdout.isatty() else str
    for piece in pieces:
        sys.stdout.write(safe(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
