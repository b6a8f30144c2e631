"""Options that verbs share, and the model that they open.

Options are named and preset as in llama.cpp; a command gets them under the names that `edgeq.load` and
`LLM.stream` have for them.
"""

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from ..errors import EdgeqError
from ._console import note, progress, size

if TYPE_CHECKING:
    from ..llm import LLM
    from ..memory import Estimate
    from ..tensor import Tensor

LOGIT_BIAS = re.compile(r"(\d+)([+-](?:\d+(?:\.\d*)?|\.\d+|inf))")


def _unless(neutral: int) -> Any:
    """A callback that turns values up to `neutral`, which say "not given" in llama.cpp, into None."""
    return lambda ctx, param, value: None if value <= neutral else value


def _logit_bias(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    """("15043+1", "15044-inf") -> {15043: 1.0, 15044: -inf}."""
    bias = {}
    for value in values:
        match = LOGIT_BIAS.fullmatch(value)
        if match is None:
            raise click.BadParameter(f"{value!r} is no token id with a bias, such as 15043+1 or 15043-inf")
        bias[int(match[1])] = float(match[2])
    return bias


def option(*names: str, **settings: Any) -> click.Option:
    """An option whose help shows the default, unless that says "none" or "off"."""
    settings.setdefault("show_default", settings.get("default") not in (None, -1, 0))
    if isinstance(settings.get("type"), click.types.IntParamType | click.types.FloatParamType):
        settings.setdefault("metavar", "N")
    return click.Option(names, **settings)


def adapters(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """("pirate", "polite:0.5") -> [("pirate", 1.0), ("polite", 0.5)]."""
    found = []
    for value in values:
        name, _, scale = value.rpartition(":")
        try:
            found.append((name, float(scale)) if name else (value, 1.0))
        except ValueError:  # a colon in the path
            found.append((value, 1.0))
    return found


COUNT, NUMBER, SHARE = click.IntRange(0), click.FloatRange(0), click.FloatRange(0, 1)
CacheType = Literal["f32", "f16", "q8_0"]
CACHE_TYPE = click.Choice(get_args(CacheType))
TEXT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

MODEL = option("-m", "--model", metavar="MODEL", help="A name, hf:USER/REPO[:QUANT], an address or a path.")
LOADING = (
    option("-c", "--ctx-size", "ctx", type=COUNT, default=0, callback=_unless(0),
            help="Tokens of context. 0: as many as the model allows, up to 4096."),
    option("-t", "--threads", type=click.IntRange(-1), default=-1, callback=_unless(0),
            help="-1: one for each core."),
    option("-ctk", "--cache-type-k", type=CACHE_TYPE, help="Of keys; q8_0 takes half the memory of f16."),
    option("-ctv", "--cache-type-v", type=CACHE_TYPE, help="Of values."),
    option("--backend", type=click.Choice(["numba", "numpy"]), default="numba",
            help="numpy is slow and exact."),
    option("--chat-template", metavar="TEXT", help="Jinja, or the name of a built-in template."),
    option("--chat-template-file", type=TEXT_FILE, help="A file with one."),
    option("--unknown-pre", metavar="NAME", help="Pre-tokenizer for a file whose own edgeq does not know."),
    option("--lora", metavar="ADAPTER[:SCALE]", multiple=True, callback=adapters,
            help="A PEFT folder or GGUF file with a LoRA adapter; of several, all are added."),
    option("--check-tensors", is_flag=True, help="Refuse a model whose weights are not all finite numbers."),
    option("--force", is_flag=True, help="Load the model even if it does not seem to fit in memory."),
    option("-v", "--verbose", is_flag=True, help="Tell about memory and timings."),
)  # fmt: skip
SAMPLING = (
    option("-n", "--predict", "--n-predict", "max_tokens", type=click.IntRange(-2), default=-1,
            callback=_unless(-1), help="Tokens to make at most. -1: until the model ends."),
    option("-s", "--seed", type=click.IntRange(-1), default=-1, callback=_unless(-1), help="-1: random."),
    option("--temp", "temperature", type=NUMBER, default=0.8, help="0: always the best token."),
    option("--top-k", type=COUNT, default=40, help="0: off."),
    option("--top-p", type=SHARE, default=0.95, help="1: off."),
    option("--min-p", type=SHARE, default=0.05, help="0: off."),
    option("--typical", "typical_p", type=SHARE, default=1.0, help="1: off."),
    option("--repeat-last-n", type=click.IntRange(-1), default=64, help="0: off, -1: the whole context."),
    option("--repeat-penalty", type=NUMBER, default=1.0, help="1: off."),
    option("--presence-penalty", type=float, default=0.0, help="0: off."),
    option("--frequency-penalty", type=float, default=0.0, help="0: off."),
    option("-l", "--logit-bias", multiple=True, metavar="ID±BIAS", callback=_logit_bias,
            help="For example 15043+1 or 15043-inf."),
    option("-r", "--stop", "--reverse-prompt", "stop", multiple=True, metavar="TEXT",
            help="Text that ends the answer."),
    option("--context-shift", is_flag=True, help="Forget the middle when the context is full."),
    option("--keep", type=click.IntRange(-1), default=0, help="Prompt tokens that a shift keeps. -1: all."),
    option("--prompt-lookup", "--draft-max", "prompt_lookup", type=click.IntRange(0, 15), default=0,
            help="Tokens to guess ahead from the text so far: what repeats comes sooner. 0: off."),
)  # fmt: skip
SYSTEM = option("-sys", "--system-prompt", metavar="TEXT")


def pick(given: dict[str, Any], group: Sequence[click.Option]) -> dict[str, Any]:
    """The values of a group of options among those that a command was given."""
    return {str(o.name): given[str(o.name)] for o in group}


@contextmanager
def usage() -> Iterator[None]:
    """Turn the ValueError of an option that is out of range into an error of usage."""
    try:
        yield
    except EdgeqError:  # some are ValueErrors, too
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@contextmanager
def _growing() -> Iterator[None]:
    """Let Python look less often for reference cycles, while it imports and reads what is not in any: to look
    through all of that, again and again as it grows, takes a tenth of the time.
    """
    usual = gc.get_threshold()
    gc.set_threshold(50_000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@_growing()
def open_model(
    name: str | None,
    *,
    ctx: int | None = None,
    threads: int | None = None,
    cache_type_k: CacheType | None = None,
    cache_type_v: CacheType | None = None,
    backend: Literal["numba", "numpy"] = "numba",
    chat_template: str | None = None,
    chat_template_file: Path | None = None,
    unknown_pre: str | None = None,
    lora: Sequence[tuple[str, float]] = (),
    check_tensors: bool = False,
    force: bool = False,
    verbose: bool = False,
) -> "LLM":
    """Load a model, the catalog's default if none is named, with its progress on stderr."""
    import edgeq

    from .. import catalog, files, memory
    from ..llm import DEFAULT_CTX

    def check(path: Path, meta: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        if check_tensors:
            files.check_finite(path, tensors.values())
        c = memory.shape(meta, tensors, path)
        tokens = min(ctx or DEFAULT_CTX, c.context_length)
        types = cache_type_k, cache_type_v
        need = memory.estimate(c, tensors, backend=backend, ctx=tokens, cache_types=types)
        _check_memory(path, need, tokens, force, verbose)

    with progress() as report:
        path = catalog.resolve(name or catalog.default(), report)
        with usage():
            return edgeq.load(
                path,
                backend=backend,
                threads=threads,
                ctx=ctx,
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                chat_template=chat_template_file or chat_template,
                unknown_pre=unknown_pre,
                lora=lora,
                check=check,
                progress=report,
            )


def _check_memory(path: Path, need: "Estimate", ctx: int, force: bool, verbose: bool) -> None:
    """Raise EdgeqError for a model that does not fit in memory."""
    from .. import memory

    free = memory.available()
    parts = (
        f"weights {size(need.weights)}, program {size(need.program)}, "
        f"and up to {size(need.cache + need.work)} as the context of {ctx} tokens fills"
    )
    if verbose:
        note(f"memory: {parts}; {size(free)} available")
    if need.total > free and not force:
        raise EdgeqError(
            f"{path.name} needs {size(need.total)} of memory ({parts}), {size(free)} are available. "
            "Take a smaller context (-c) or model, or try all the same with --force"
        )


def note_timings(llm: "LLM") -> None:
    """Tell how long the latest prompt and answer took, as llama.cpp counts."""
    t = llm.timings
    for what, n, ms in (("prompt", t.prompt_n, t.prompt_ms), ("answer", t.predicted_n, t.predicted_ms)):
        rate = f", {n / ms * 1000:.1f} tokens/s" if ms else ""
        note(f"{what}: {n} tokens in {ms / 1000:.2f} s{rate}")
    if t.draft_n:
        note(f"prompt lookup: {t.draft_n_accepted} of {t.draft_n} guesses were right")


def read_text(file: Path) -> str:
    """A file's text, with its line ends as they are."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise EdgeqError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
