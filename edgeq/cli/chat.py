"""`edgeq chat [MODEL]`: a conversation."""

import atexit
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from ..errors import ContextFull
from ._console import note, progress
from ._model import LOADING, MODEL, SAMPLING, SYSTEM, note_timings, open_model, pick, usage
from .run import write

if TYPE_CHECKING:
    from ..llm import LLM

HELP = """\
/clear          forget the conversation
/system TEXT    set the system prompt (without TEXT: none), and forget the conversation
/stats          timings of the latest answer, and how full the context is
/help           this list
/exit           leave, as does Ctrl-D

A line that ends with \\ goes on in the next one, and so does all between two lines that are \"\"\" alone.
Ctrl-C stops an answer."""
QUOTES = '"""'


@click.command(params=[MODEL, SYSTEM, *LOADING, *SAMPLING])
@click.argument("name", required=False, metavar="[MODEL]")
def command(name: str | None, **given: Any) -> None:
    """Talk with MODEL.

    MODEL is a name of the catalog, an address or a path. /help lists what else can be said. Where stdin is no
    terminal, each of its lines is a message.
    """
    if name and given["model"]:
        raise click.UsageError("the model is given twice")
    with open_model(name or given["model"], **pick(given, LOADING)) as llm, usage():
        if llm.chat_template is None:
            raise click.UsageError(
                "this model has no chat template: give one with --chat-template, or use edgeq run"
            )
        if sys.stdin.isatty():
            keep_lines()
            note("Ctrl-C stops an answer, /help tells more.")
        Conversation(llm, given["system_prompt"], pick(given, SAMPLING), given["verbose"]).run()


class Conversation:
    """A model, what was said so far, and how it is to answer."""

    def __init__(self, llm: "LLM", system: str | None, options: dict[str, Any], verbose: bool) -> None:
        self.llm, self.options, self.verbose = llm, options, verbose
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget everything but the system prompt."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Read messages and answer them, until /exit or the end of stdin."""
        going = True
        while going:
            try:
                going = self.turn()
            except KeyboardInterrupt:  # in the moment between reading and answering, or answering and reading
                if not sys.stdin.isatty():
                    raise
                click.echo()

    def turn(self) -> bool:
        """Read a message and do what it says; False when it ends the conversation."""
        text = read_message()
        if text is None:
            return False
        verb, _, rest = text.partition(" ")
        match verb:
            case "":
                pass
            case "/exit" | "/quit" | "/bye":
                return False
            case "/clear":
                self.begin(self.system)
            case "/system":
                self.begin(rest.strip() or None)
            case "/stats":
                self.tell_stats()
            case "/help":
                note(HELP)
            case _ if verb.startswith("/") and "/" not in verb[1:]:
                note(f"there is no {verb}; /help lists what there is")
            case _:
                self.answer(text)
        return True

    def answer(self, text: str) -> None:
        """Answer a message. What Ctrl-C leaves of an answer stays in the conversation."""
        said: list[str] = []

        def kept(stream: Iterator[str]) -> Iterator[str]:
            for piece in stream:
                said.append(piece)
                yield piece

        self.messages.append({"role": "user", "content": text})
        try:
            with progress() as report:
                stream = self.llm.chat(self.messages, stream=True, progress=report, **self.options)
                with closing(stream):
                    write(kept(stream))
            if stream.finish_reason == "length" and self.options["max_tokens"] is None:
                note("The context is full: /clear empties it, and --context-shift forgets what is oldest.")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()
        except ContextFull as error:
            note(f"{error}. /clear empties the context.")
        if said:
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()
        if self.verbose:
            note_timings(self.llm)

    def tell_stats(self) -> None:
        """Timings of the latest answer, and what it left of the context."""
        note_timings(self.llm)
        t = self.llm.timings
        note(f"context: {t.cache_n + t.prompt_n + t.predicted_n} of {self.llm.ctx} tokens")


def read_message() -> str | None:
    """What is said next, of one line or of several; None at the end of stdin."""
    while True:
        try:
            lines = [read_line("> ")]
            if lines[0].strip() == QUOTES:
                lines = list(iter(lambda: read_line(". ").rstrip(), QUOTES))
            else:
                while lines[-1].endswith("\\"):
                    lines[-1:] = [lines[-1][:-1], read_line(". ")]
            return "\n".join(lines).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            note("\nCtrl-D or /exit leaves.")


def read_line(prompt: str) -> str:
    """A line of stdin, prompted for on a terminal."""
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(prompt)  # here readline must know it
    click.echo(prompt, err=True, nl=False)
    return input()


def keep_lines() -> None:
    """Let the arrow keys bring back what was typed before, in other conversations as well."""
    with suppress(ImportError, OSError):  # Python without readline; an empty file, to macOS's
        import readline

        from ..paths import cache_dir

        file = cache_dir() / "chat_history"
        file.touch(mode=0o600)
        readline.read_history_file(file)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, file)
