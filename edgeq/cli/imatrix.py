"""`edgeq imatrix -m MODEL -f TEXT -o OUT`: how much each input of a model's matrices matters."""

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._console import note, orderly, progress
from ._model import LOADING, MODEL, TEXT_FILE, open_model, option, pick, read_text, usage

if TYPE_CHECKING:
    from ..files.imatrix import Imatrix, Squares

OPENING = [o for o in LOADING if not str(o.name).startswith(("ctx", "chat_template"))]

OPTIONS = (
    MODEL,
    option("-f", "--file", type=TEXT_FILE, help="The text, in UTF-8."),
    option("-o", "--output-file", "out", type=click.Path(dir_okay=False, path_type=Path),
            default="imatrix.gguf", help="What is measured, in llama.cpp's older form if it ends in .dat."),
    option("-c", "--ctx-size", "ctx", type=click.IntRange(8), default=512, help="Tokens of a chunk."),
    option("--chunks", type=click.IntRange(-1), default=-1, help="Read so many. -1: the whole text."),
    option("--chunk", "--from-chunk", "first", type=click.IntRange(0), default=0,
            help="Begin with this one."),
    option("--in-file", "before", multiple=True, type=TEXT_FILE, help="Add what was measured before."),
    option("--process-output", "output", is_flag=True, help="Measure the output matrix, too."),
    option("-ofreq", "--output-frequency", "every", type=click.IntRange(0), default=10,
            help="Write the file after so many chunks. 0: at the end."),
    *OPENING,
)  # fmt: skip


@click.command(params=list(OPTIONS))
def command(
    model: str | None,
    file: Path | None,
    out: Path,
    ctx: int,
    chunks: int,
    first: int,
    before: tuple[Path, ...],
    output: bool,
    every: int,
    **given: Any,
) -> None:
    """Measure how much each input of MODEL's matrices matters in a text, for `edgeq quantize --imatrix`.

    Files of llama-imatrix and of this are the same. Without a text those that are named with --in-file
    become one.

    Ctrl-C ends the measurement, and keeps what it found up to then.
    """
    from .. import calibrate
    from ..files import imatrix

    with usage():
        earlier = [imatrix.read(path) for path in before]

        def save(squares: "dict[str, Squares]", done: int) -> "Imatrix":
            """Write what was measured up to now."""
            new = [imatrix.Imatrix(squares, [str(file)], done, ctx)] if done else []
            merged = imatrix.merge([*earlier, *new])
            imatrix.write(out, replace(merged, chunk_size=ctx))
            return merged

        if file is None:
            if not earlier:
                raise click.UsageError("expected a text (-f), or files to add (--in-file)")
            done, wanted, merged = 0, 0, save({}, 0)
        else:
            text = read_text(file)
            with ExitStack() as stack:
                llm = stack.enter_context(open_model(model, **pick(given, OPENING), ctx=ctx))
                report = stack.enter_context(progress())
                report("tokenizing", 0, 1)
                windows = calibrate.cut_chunks(llm, text, ctx, max(chunks, 0) or None, first)
                stack.enter_context(orderly())
                done, wanted = 0, len(windows)
                squares: dict[str, Squares] = {}
                report("measuring", 0, wanted)
                with suppress(KeyboardInterrupt):
                    for done, squares in enumerate(calibrate.measure(llm.model, windows, output=output), 1):
                        report("measuring", done, wanted)
                        if every and done % every == 0 and done < wanted:
                            save(squares, done)
                if not done:
                    raise KeyboardInterrupt
                merged = save(squares, done)
    note(f"{len(merged.squares)} matrices, {merged.chunks} chunks of {ctx} tokens")
    if done < wanted:
        note(f"stopped after {done} of {wanted} chunks; go on with --in-file {out} --chunk {first + done}")
    click.echo(out)
    if done < wanted:
        raise click.Abort
