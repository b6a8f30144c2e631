"""The catalog: from the name of a model to a file on this disk.

    smollm2                         an entry of models/catalog.toml
    hf:USER/REPO[:QUANT]            a repository of the Hugging Face Hub
    https://HOST/PATH[#sha256=HEX]  a file on the web
    PATH                            a .gguf file, or a Hugging Face folder

What is fetched stays in the cache, one folder a name. A folder is made elsewhere and renamed when complete:
its being there is all there is to know, whoever else is fetching the same model.
"""

import difflib
import os
import re
import shutil
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from . import fetch, hub
from .errors import EdgeqError, ModelNotFound
from .fetch import Progress
from .paths import cache_dir

SCHEMES = ("hf:", "https:", "http:")
HUB_NAME = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?::(\w[\w.-]*))?")


class Entry(NamedTuple):
    """A model of the catalog; models/catalog.toml explains the fields."""

    name: str
    sources: tuple[str, ...]
    file: str
    sha256: str
    size: int
    license: str
    description: str


class Installed(NamedTuple):
    """A model in the cache: the name that resolves to it, its file or folder, and its bytes."""

    name: str
    path: Path
    size: int


def default() -> str:
    """Name of the model that runs when none is named."""
    return _read(_file())[0]


def entries() -> dict[str, Entry]:
    """The models of the catalog, by name."""
    return _read(_file())[1]


def is_model(text: str) -> bool:
    """Whether a text names a model (it may not be on this disk yet), and is not a prompt."""
    if text in entries() or text.startswith(SCHEMES):
        return True
    return _exists(text) or (text.endswith(".gguf") and not any(c.isspace() for c in text))


def resolve(
    name_or_path: str | os.PathLike[str], progress: Progress | None = None, download: bool = True
) -> Path:
    """The file or folder of a model, fetched into the cache if it is not there.

    Parameters
    ----------
    name_or_path : catalog name, ``hf:USER/REPO[:QUANT]``, https address, .gguf file or Hugging Face folder.
    progress : called with (what is being done, bytes done, bytes in all).
    download : whether to fetch what is not in the cache; when not, that is a ModelNotFound.
    """
    name = os.fspath(name_or_path)
    if name not in entries() and not name.startswith(SCHEMES):
        if _exists(name):
            return Path(name).expanduser()
        close = difflib.get_close_matches(name, entries(), n=1)
        advice = f"did you mean {close[0]}?" if close else "`edgeq list` shows the catalog"
        raise ModelNotFound(f"no model, file or folder is named {name!r}; {advice}")
    path = local(name)
    if path is None:
        if not download:
            raise ModelNotFound(f"{name} is not on this machine; `edgeq pull {name}` fetches it")
        _install(name, progress)
        path = local(name)
    if path is None:
        raise ModelNotFound(f"{name} was removed while it was being fetched")
    return path


def verify(name: str, progress: Progress | None = None) -> None:
    """Hash a model of the catalog that is in the cache; FormatError when it is not what the catalog says."""
    path, entry = resolve(name, download=False), entries().get(name)
    if entry:
        hint = f"`edgeq rm {name}` and `edgeq pull {name}` fetch it again"
        fetch.check(path, "sha256", fetch.hash_file(path, f"checking {name}", progress), entry.sha256, hint)


def local(name: str) -> Path | None:
    """File or folder of a catalog name or an address if it is on this disk."""
    if (entry := entries().get(name)) is not None:
        beside = len(entry.sources) == 1 and ":" not in entry.sources[0]
        path = _file().parent / entry.sources[0] if beside else _folder(name) / entry.file
        return path if path.is_file() and path.stat().st_size == entry.size else None
    folder = _folder(name)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return (
        next((f for f in files if f.suffix == ".gguf"), files[0] if len(files) == 1 else folder)
        if files
        else None
    )


def installed() -> list[Installed]:
    """Every model in the cache."""
    found = []
    for folder in sorted(cache_dir("models").glob("*")):
        name = unquote(folder.name)
        if not name.startswith(fetch.SCRATCH) and (path := local(name)):
            found.append(Installed(name, path, fetch.bytes_in(folder)))
    return found


def remove(name: str) -> int:
    """Delete a model from the cache and return its bytes. Files that are not in the cache are not touched."""
    folder = _folder(name)
    listed = folder in cache_dir("models").iterdir()  # "" and ".." never are
    if not listed or name.startswith(fetch.SCRATCH):
        raise ModelNotFound(f"{name} is not in the cache; `edgeq list` shows what is")
    size = fetch.bytes_in(folder)
    shutil.rmtree(folder)
    return size


def _file() -> Path:
    """models/catalog.toml: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "models" / "catalog.toml"
    return inside if inside.exists() else package.parent / "models" / "catalog.toml"


@cache
def _read(path: Path) -> tuple[str, dict[str, Entry]]:
    """Default name and entries of a catalog file."""
    models = tomllib.loads(path.read_text(encoding="utf-8"))
    first = models.pop("default")
    return first, {
        name: Entry(name, tuple(fields.pop("sources")), **fields) for name, fields in models.items()
    }


def _exists(path: str) -> bool:
    try:
        return path != "" and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a prompt: too long for a path, with a NUL, "~someone ..."
        return False


def _folder(name: str) -> Path:
    """Where a model is kept: its name (an address without ?query and #fragment), spelled as one folder."""
    bare = re.sub(r"[?#].*", "", name) if name.startswith(SCHEMES) else name
    return cache_dir("models") / quote(bare, safe="")


def _install(name: str, progress: Progress | None) -> None:
    """Fetch a model into the cache."""
    folder = _folder(name)
    with fetch.scratch(folder.parent) as scratch:
        made = scratch / "model"
        made.mkdir()
        try:
            _fetch(name, made, progress)
        except ModelNotFound as error:
            raise ModelNotFound(
                f"{name} is not on this machine and cannot be fetched: {error}\n{_by_hand(name)}"
            ) from error
        if local(name) is None:
            shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
            made.rename(folder)


def _fetch(name: str, folder: Path, progress: Progress | None) -> None:
    """Fetch a model into an empty folder."""
    entry, stage = entries().get(name), f"downloading {name}"
    sources = entry.sources if entry else (name,)
    if sources[0].startswith("hf:"):
        match = HUB_NAME.fullmatch(sources[0])
        if match is None:
            raise EdgeqError(f"{name}: a model of the Hub is named hf:USER/REPO or hf:USER/REPO:QUANT")
        hub.fetch(match[1], match[2], folder, stage, progress)
    elif entry:
        fetch.file(entry.sources, folder / entry.file, stage, progress, size=entry.size, sha256=entry.sha256)
    else:
        url, _, fragment = name.partition("#")
        file = unquote(urlsplit(url).path.rsplit("/", 1)[-1]).replace("/", "_") or "model.gguf"
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        fetch.file([url], folder / file, stage, progress, sha256=sha256)


def _by_hand(name: str) -> str:
    """What to do where a model cannot be fetched."""
    advice = "Try again online, or give the path of a .gguf file instead of a name."
    if entry := entries().get(name):
        advice += f" Or copy {entry.file} from elsewhere (sha256 {entry.sha256}) into {_folder(name)}"
    return advice
