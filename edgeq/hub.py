"""The Hugging Face Hub: which files of a repository make a model, and fetching them."""

import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ModelNotFound
from .fetch import Progress, bytes_in, check, hash_file, need

NOT_MODELS = (
    "mmproj",
    "imatrix",
    "mtp-",
    "eagle3-",
    "dflash-",
    "dspark-",
)  # GGUF files that go beside a model
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def choose(names: Sequence[str], quant: str | None) -> list[str]:
    """The files to take from a repository, as llama.cpp chooses them; [] when there are none.

    A name fits when `quant` stands in it before a dot or a dash; without a quant Q4_K_M is looked for, then
    Q8_0, then anything. A repository without GGUF files is taken as Hugging Face stores models.
    """
    names = [n for n in names if not n.startswith("/") and ".." not in n.split("/")]
    models = [
        n for n in sorted(names) if n.endswith(".gguf") and not any(w in Path(n).name for w in NOT_MODELS)
    ]
    first = [n for n in models if (split := SPLIT.search(n)) is None or split[1] == "00001"]
    for wanted in [quant] if quant else ["Q4_K_M", "Q8_0", ""]:
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        for name in first:
            if pattern.search(name):
                stem = SPLIT.sub("", name)
                return [
                    name,
                    *(n for n in models if n != name and SPLIT.search(n) and SPLIT.sub("", n) == stem),
                ]
    if quant or models or "config.json" not in names:
        return []
    suffixes = (".json", ".safetensors", ".jinja", "tokenizer.model")
    return [
        "config.json",
        *(n for n in sorted(names) if n != "config.json" and "/" not in n and n.endswith(suffixes)),
    ]


def fetch(repo: str, quant: str | None, folder: Path, stage: str, progress: Progress | None = None) -> None:
    """Fetch a model of a repository into a folder; ModelNotFound if it fails, FormatError on a wrong hash."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    except ImportError as error:
        raise ModelNotFound("hf: models need an extra: pip install 'edgeq[hub]'") from error
    disable_progress_bars()
    api = HfApi(library_name="edgeq")
    listing = _ask(api.model_info, repo, files_metadata=True)
    siblings = {s.rfilename: s for s in listing.siblings}
    names = choose(list(siblings), quant)
    if not names:
        there = ", ".join(n for n in siblings if n.endswith(".gguf")) or "no GGUF file"
        raise ModelNotFound(f"{repo} has nothing for {quant or 'any quantization'}; it has {there}")
    total = sum(siblings[n].size or 0 for n in names)
    need(folder, total)

    failures: list[Exception] = []

    def download() -> None:
        try:
            for name in names:
                _ask(api.hf_hub_download, repo, name, revision=listing.sha, local_dir=folder)
        except ModelNotFound as error:
            failures.append(error)

    # in a thread of its own, so that this one can tell the progress and hear Ctrl-C
    worker = threading.Thread(target=download, daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(0.1)
        if progress:
            progress(stage, min(bytes_in(folder), total), total)
    if failures:
        raise failures[0]
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes
    for name in names:
        if lfs := siblings[name].lfs:
            check(name, "sha256", hash_file(folder / name, f"checking {name}", progress), lfs.sha256)


def _ask(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call's result; whatever goes wrong becomes ModelNotFound."""
    try:
        return call(*args, **options)
    except Exception as error:  # its HTTP library's come through as well, and that library has changed
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFound(f"the Hugging Face Hub did not answer: {reason}") from error
