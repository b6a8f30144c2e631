"""`edgeq convert SRC DST`: a model from one container to the other."""

import time

import click

from ._console import note, orderly, progress, size
from ._model import option, usage
from ._output import SPLIT, THREADS

FLOATS = ("f32", "f16", "bf16")
INTEGERS = ("int8", "int4", "int3", "int2", "int1", "nf4", "ternary")
LAYOUTS = ("compressed-tensors", "awq", "bitnet", "bitsandbytes", "eetq", "gptq", "hqq")


@click.command(
    params=[
        click.Argument(["src"]),
        click.Argument(["dst"]),
        option("--outtype", default="auto",
               type=click.Choice(["auto", "nearest", *FLOATS, "q8_0", *INTEGERS]),
               help="Type of matrices. auto: that of the source, in a folder f16 where it has another; in a "
               "GGUF file integers of a folder have the smallest type that holds just these. nearest: GGUF "
               "only, the type that comes nearest where none does. q8_0: GGUF only. int8 to ternary: folders "
               "only, linear layers."),
        option("--layout", type=click.Choice(LAYOUTS),
               help="Whose layout integers have in a folder. Unless given: compressed-tensors, of ternary "
               "layers bitnet, of nf4 bitsandbytes. With auto, integers of the source are kept."),
        option("--group-size", "group", type=click.IntRange(32),
               help="Columns of an integer layer that share a scale. Unless given: all with int8, else 64."),
        option("--asymmetric", is_flag=True, help="Integer layers with zero points."),
        SPLIT,
        THREADS,
    ]
)  # fmt: skip
def command(
    src: str,
    dst: str,
    outtype: str,
    layout: str | None,
    group: int | None,
    asymmetric: bool,
    max_size: int | None,
    threads: int | None,
) -> None:
    """Write the model SRC as DST: a GGUF file where the name ends in .gguf, else a Hugging Face folder.

    SRC is either of the two, or the name of a model.
    """
    from .. import catalog, quantizers
    from ..convert.huggingface import to_huggingface

    if (group or asymmetric) and outtype not in INTEGERS:
        raise click.UsageError(f"--group-size and --asymmetric are for {', '.join(INTEGERS)}")
    file = dst.endswith(".gguf")
    if file and (layout or outtype in INTEGERS):
        raise click.UsageError(f"{layout or outtype} is for folders: {dst} would be a GGUF file")
    if not file and outtype in ("nearest", "q8_0"):
        raise click.UsageError(f"{outtype} is for GGUF files: name one that ends in .gguf")
    start = time.monotonic()
    with usage(), progress() as report, orderly():
        path = catalog.resolve(src, report)
        if file:
            name = "copy" if outtype == "auto" else outtype
            plan = quantizers.plan(path, name, pure=True, allow_requantize=outtype in FLOATS)
            paths = quantizers.write(plan, dst, max_size=max_size, threads=threads, progress=report)
        else:
            folder = to_huggingface(
                path,
                dst,
                outtype,
                layout=layout,
                group=group,
                symmetric=not asymmetric,
                max_size=max_size,
                threads=threads,
                progress=report,
            )
            paths = [folder]
    files = [f for p in paths for f in (p.iterdir() if p.is_dir() else [p])]
    note(f"{size(sum(f.stat().st_size for f in files))} in {time.monotonic() - start:.1f} s")
    for p in paths:
        click.echo(p)
