"""`edgeq train lora MODEL --data FILE -o DIR`: adapt a model to examples; `edgeq train qat MODEL TYPE`: train
it for the type that it will be stored in.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._console import note, orderly, progress
from ._model import TEXT_FILE, option, pick, read_text, usage

if TYPE_CHECKING:
    from ..train.loop import Point

AT_LEAST_1 = click.IntRange(1)
EXAMPLES = (
    option("-d", "--data", type=TEXT_FILE, required=True, help="Examples, .txt or .jsonl."),
    option("-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path), required=True,
            metavar="DIR", help="Folder for what is made."),
)  # fmt: skip
ADAPTER = (
    option("-r", "--rank", "r", type=AT_LEAST_1, default=8, help="Of the adapter's matrices."),
    option("--alpha", "lora_alpha", type=float, default=16.0, help="The adapter counts alpha / rank."),
    option("--rslora", "use_rslora", is_flag=True, help="It counts alpha / sqrt(rank)."),
    option("--dropout", "lora_dropout", type=float, default=0.0, help="Share of inputs left out."),
    option("--targets", "target_modules", metavar="NAMES", default="q_proj,k_proj,v_proj,o_proj",
            callback=lambda ctx, param, value: tuple(value.split(",")),
            help="Matrices with an adapter, such as q_proj or attn_q; all-linear for all."),
    option("--bias", type=click.Choice(["none", "lora_only", "all"]), default="none",
            help="Biases that learn, too."),
)  # fmt: skip
STEPS = (
    option("--epochs", type=click.FloatRange(0, min_open=True), default=1.0,
            help="How often the examples are seen."),
    option("--steps", type=AT_LEAST_1, help="Take so many steps instead."),
    option("--length", type=click.IntRange(2), default=256, help="Tokens of an example; more are cut."),
    option("-b", "--batch", type=AT_LEAST_1, default=1, help="Examples that are computed together."),
    option("--accumulate", type=AT_LEAST_1, default=1, help="Batches of a step."),
    option("--lr", "rate", type=click.FloatRange(0, min_open=True), default=2e-4,
            help="Highest learning rate."),
    option("--warmup", type=click.IntRange(0), default=0, help="Steps that rise to it."),
    option("--optimizer", type=click.Choice(["adamw", "sgd", "muon"]), default="adamw"),
    option("--decay", type=click.FloatRange(0), default=0.0, help="Weight decay."),
    option("--clip", type=click.FloatRange(0, min_open=True), default=1.0, help="Longest gradient."),
    option("-s", "--seed", type=click.IntRange(0), default=0),
    option("--save-every", type=AT_LEAST_1, default=50, help="Steps between checkpoints."),
    option("--resume", is_flag=True, help="Go on from the latest checkpoint in DIR."),
    option("--again", is_flag=True,
            help="Compute layers again for the gradients: less memory for long examples, more time."),
    option("--chat-template-file", type=TEXT_FILE, help="Jinja, instead of the model's own."),
)  # fmt: skip


@click.group()
def command() -> None:
    """Train on this machine's CPU."""


@command.command(
    "lora",
    params=[
        click.Argument(["model"]),
        *EXAMPLES,
        *ADAPTER,
        *STEPS,
        option("--quantized", is_flag=True,
                help="Decode weights where they are used, not once: less memory, more time."),
        option("--teacher", metavar="MODEL",
                help="Learn what this model says of the examples: the one that MODEL was quantized from."),
    ],
)  # fmt: skip
def train_lora(
    model: str,
    data: Path,
    folder: Path,
    quantized: bool,
    teacher: str | None,
    chat_template_file: Path | None,
    **given: Any,
) -> None:
    """Train a LoRA adapter for MODEL, quantized or not.

    A .txt file is learned as it is. Each line of a .jsonl file is {"prompt": ..., "completion": ...} or
    {"messages": [{"role": ..., "content": ...}, ...]}, of which the completion, or what the assistant says,
    is learned. DIR gets the adapter as PEFT has it, loss.csv and loss.png, and checkpoints; Ctrl-C leaves the
    last of them, from which --resume goes on.
    """
    from ..train.lora import Settings
    from ..train.run import train_lora as train

    template = None if chat_template_file is None else read_text(chat_template_file)
    with usage(), progress() as report:
        outcome = train(
            model,
            data,
            folder,
            settings=Settings(**pick(given, ADAPTER)),
            hold=not quantized,
            teacher=teacher,
            chat_template=template,
            progress=report,
            **{key: value for key, value in given.items() if key not in pick(given, ADAPTER)},
        )
    note_curve(outcome.curve)
    click.echo(outcome.path)


@command.command(
    "qat",
    params=[
        click.Argument(["model"]),
        click.Argument(["format"], metavar="TYPE"),
        *EXAMPLES,
        option("--mean", is_flag=True, help="Ternary scales that are mean magnitudes, as BitNet has them."),
        option("--lsq", is_flag=True, help="Scales that learn."),
        option("--activations", is_flag=True, help="Round inputs to 8 bits."),
        option("--distill", is_flag=True, help="Learn what MODEL says, instead of the text."),
        *STEPS,
    ],
)
def train_qat(
    model: str, format: str, data: Path, folder: Path, chat_template_file: Path | None, **given: Any
) -> None:
    """Train the layers of MODEL for TYPE, such as q8_0, q4_0 or tq2_0, or i8, i4, ternary or binary.

    The data are as for `edgeq train lora`. DIR gets model.gguf, or for the last four a Hugging Face folder
    model, and loss.csv, loss.png and checkpoints.
    """
    from ..train.run import train_quantized

    template = None if chat_template_file is None else read_text(chat_template_file)
    with usage(), progress() as report, orderly():
        outcome = train_quantized(
            model, format.lower(), data, folder, chat_template=template, progress=report, **given
        )
    note_curve(outcome.curve)
    click.echo(outcome.path)


def note_curve(curve: "list[Point]") -> None:
    """How a run went."""
    seconds, tokens = sum(point.seconds for point in curve), sum(point.tokens for point in curve)
    speed = f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)"
    note(f"{len(curve)} steps, {speed}, loss {curve[0].loss:.3f} to {curve[-1].loss:.3f}")
