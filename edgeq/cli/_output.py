"""Options that verbs which write models share."""

import re

import click

from ._model import option

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """ "2G" -> 2,000,000,000."""
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)([KMG]?)", value.upper())
    if match is None:
        raise click.BadParameter(f"{value!r} is no size, such as 500M or 2G")
    return int(match[1]) * UNITS[match[2]]


SPLIT = option("--split-max-size", "max_size", metavar="N(M|G)", callback=_size,
               help="Several files with tensors of at most this size.")  # fmt: skip
THREADS = option("-t", "--threads", type=click.IntRange(1), help="One for each core unless given.")
