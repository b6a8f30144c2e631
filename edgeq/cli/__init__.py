"""The command line. A verb is a file: `edgeq run` is the `command` of edgeq/cli/run.py, imported when called.

Modules whose names begin with an underscore hold what verbs share. What was asked for goes to stdout, all
else to stderr; an EdgeqError is one line there and exit status 1, wrong usage is 2, Ctrl-C 130.
"""

import gc
import importlib
import io
import os
import pkgutil
import sys
import warnings

import click

# NumPy's OpenBLAS reads it when it is loaded: for 30 ms after each product its threads would wait busily for
# the next, where those of `kernels/pool.py` are to compute
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

from .. import __version__
from ..errors import EdgeqError
from ._console import note, printable


class Verbs(click.Group):
    """The files of this folder as commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all verbs, sorted."""
        return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a verb."""
        if name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{__name__}.{name}").command


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgeq")
def edgeq() -> None:
    """Run small language models on this machine's CPU."""


def main() -> None:
    """Entry point of the `edgeq` command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # another encoding is no reason to stop
    warnings.formatwarning = lambda message, *_: f"edgeq: {printable(str(message))}\n"
    try:
        status = edgeq.main(prog_name="edgeq", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        status = 130
    except (click.ClickException, EdgeqError, OSError, MemoryError) as error:
        if os.environ.get("EDGEQ_DEBUG") == "1":
            raise
        if isinstance(error, click.ClickException):
            error.show()
            status = error.exit_code
        else:
            note(printable(f"edgeq: {str(error) or type(error).__name__}"))
            status = 1
    gc.freeze()  # Python ends with a search of all objects for reference cycles: 0.2 s
    sys.exit(status)
