"""Examples: token ids, and which of them are to be learned.

    .txt     a text; an example is a stretch of it, all of which is learned
    .jsonl   one object a line: {"prompt": ..., "completion": ...} or {"messages": [...]}, of which the
             completion, or what the assistant says, is learned, and how it ends

The order in which examples come is a matter of the seed alone, so a run that stops can go on.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..chat import chat_ids
from ..errors import FormatError
from ..tokenizer import Tokenizer


class Example(NamedTuple):
    """A sequence of tokens.

    Attributes
    ----------
    ids : int64 (n,).
    learned : bool (n,), what the model is to say by itself; never the first.
    """

    ids: np.ndarray
    learned: np.ndarray


class Batch(NamedTuple):
    """Sequences of one length.

    Attributes
    ----------
    ids : int64 (sequences, length), what the model reads.
    targets : int64 (sequences, length), what comes after each.
    learned : bool (sequences, length), which of these count.
    """

    ids: np.ndarray
    targets: np.ndarray
    learned: np.ndarray


def read(path: Path, tokenizer: Tokenizer, chat_template: str | None, length: int) -> list[Example]:
    """The examples of a file, of up to `length` + 1 tokens each; what is longer is cut.

    Raises
    ------
    FormatError : for a line that is no example, or a file without any.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start}, which is not"
        raise FormatError(path, "", found=found, expected="a text in UTF-8") from error
    if path.suffix == ".jsonl":
        examples = [
            _line(line, path, number, tokenizer, chat_template, length + 1)
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
        examples = [e for e in examples if e.learned.any()]
    else:
        ids = np.array(tokenizer.encode(text), np.int64)
        starts = range(0, max(len(ids) - 1, 0), length)
        examples = [_all_learned(ids[at : at + length + 1]) for at in starts]
    if not examples:
        raise FormatError(path, "", found="nothing to learn", expected="examples, see edgeq train --help")
    return examples


def _all_learned(ids: np.ndarray) -> Example:
    return Example(ids, np.arange(len(ids)) > 0)


def _line(
    line: str, path: Path, number: int, tokenizer: Tokenizer, chat_template: str | None, most: int
) -> Example:
    """The example in a line of JSON, cut to so many tokens."""

    def fail(found: str, expected: str) -> FormatError:
        return FormatError(path, f"line {number}", found=found, expected=expected)

    try:
        entry = json.loads(line)
    except ValueError as error:
        raise fail("no JSON", f"an object ({error})") from error
    if not isinstance(entry, dict):
        raise fail(type(entry).__name__, "an object")
    if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        pieces = _completion(entry["prompt"], entry["completion"], tokenizer)
    elif isinstance(entry.get("messages"), list):
        if chat_template is None:
            raise fail("messages", "prompt and completion, as the model has no chat template")
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in entry["messages"]):
            raise fail("messages", "a list of objects with role and content")
        talk = _conversation(entry["messages"], tokenizer, chat_template)
        if talk is None:
            raise fail("several answers", "one: the chat template changes what was said before")
        if not talk:
            raise fail("no message of the assistant", "one to learn")
        pieces = talk
    else:
        raise fail(f"keys {', '.join(map(str, entry)) or 'none'}", "prompt and completion, or messages")
    ids = np.concatenate([np.array(ids, np.int64) for ids, _ in pieces])[:most]
    learned = np.concatenate([np.full(len(ids), learned) for ids, learned in pieces])[:most]
    if len(ids):
        learned[0] = False
    return Example(ids, learned)


def _completion(prompt: str, completion: str, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Prompt, completion, and the end."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [
        (tokenizer.encode(prompt), False),
        (tokenizer.encode(completion, add_special=False) + end, True),
    ]


def _conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, source: str
) -> list[tuple[list[int], bool]] | None:
    """A conversation as the template renders it, of which the assistant's answers are learned; None where the
    template renders a message in another way when more come after it.
    """
    pieces: list[tuple[list[int], bool]] = []
    done: list[int] = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = chat_ids(tokenizer, source, messages[:i])
        after = chat_ids(tokenizer, source, messages[: i + 1], add_generation_prompt=False)
        if before[: len(done)] != done or after[: len(before)] != before:
            return None
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


class Order:
    """Batches in an order that the seed settles: each epoch shuffles anew.

    Parameters
    ----------
    examples : from `read`.
    size : sequences of a batch; shorter ones are filled up with what is not learned.
    seed : of the order.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int) -> None:
        self.examples, self.size, self.seed = examples, size, seed

    @property
    def epoch(self) -> int:
        """Batches that hold every example once, the last one and the first of the next epoch shared."""
        return -(-len(self.examples) // self.size)

    def fingerprint(self) -> int:
        """A number that other examples would hardly have."""
        found = 0
        for e in self.examples:
            found = zlib.crc32(e.learned.tobytes(), zlib.crc32(e.ids.tobytes(), found))
        return found

    def batch(self, number: int) -> Batch:
        """The batch of that number, from 0."""
        chosen = [self._example(number * self.size + i) for i in range(self.size)]
        length = max(len(e.ids) for e in chosen) - 1
        ids = np.zeros((self.size, length + 1), np.int64)
        learned = np.zeros(ids.shape, bool)
        for row, e in enumerate(chosen):
            ids[row, : len(e.ids)], learned[row, : len(e.ids)] = e
        return Batch(ids[:, :-1], ids[:, 1:], learned[:, 1:])

    def _example(self, number: int) -> Example:
        epoch, place = divmod(number, len(self.examples))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return self.examples[order[place]]
