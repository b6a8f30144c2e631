"""Where edgeq keeps what it can make or fetch again."""

import os
import sys
from pathlib import Path

from .errors import EdgeqError


def cache_dir(*parts: str) -> Path:
    """A folder in the user's cache, made if it is not there: ``cache_dir("kernels")``.

    ``$EDGEQ_CACHE``, or what the system keeps for caches: ``~/Library/Caches/edgeq`` on macOS, elsewhere
    ``$XDG_CACHE_HOME/edgeq`` or ``~/.cache/edgeq``.
    """
    try:
        path = _base().joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: the user has no home folder
        raise EdgeqError(f"no cache folder: {e}. Name one in the environment variable EDGEQ_CACHE") from e
    return path


def _base() -> Path:
    if own := os.environ.get("EDGEQ_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgeq"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (
        xdg if xdg.is_absolute() else Path.home() / ".cache"
    ) / "edgeq"  # the standard ignores relative ones
