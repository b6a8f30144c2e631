"""The catalog and its sources, against a package index, a web server and a Hub on this machine."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edgeq import catalog, fetch, hub
from edgeq.errors import EdgeqError, FormatError, ModelNotFound

BODY = bytes(range(256)) * 12_000  # 3 MB


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[Path]:
    """Files in the cache that are not in a model's folder."""
    return [p for p in cache.rglob("*") if fetch.SCRATCH in str(p)]


# A package index: a folder of wheels, which pip is told of by its own environment variables


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages that hold the halves of BODY."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, half in enumerate((BODY[:1_000_000], BODY[1_000_000:])):
        with zipfile.ZipFile(
            folder / f"half{number}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
        ) as wheel:
            info = f"half{number}-1.0.dist-info"
            wheel.writestr(f"half{number}/data/body.{number}", half)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: half{number}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def entry(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a catalog of one model, named m, and returns the catalog's file."""

    def write(**changes: object) -> Path:
        fields = {
            "sources": [f"pypi:half{n}==1.0/half{n}/data/body.{n}" for n in (0, 1)],
            "file": "body.gguf",
            "sha256": sha256(BODY),
            "size": len(BODY),
            "license": "MIT",
            "description": "two halves",
        }
        file = tmp_path / f"catalog-{time.monotonic_ns()}.toml"
        lines = [f"{key} = {json.dumps(value)}" for key, value in (fields | changes).items()]
        file.write_text("\n".join(['default = "m"', "[m]", *lines]))
        monkeypatch.setattr(catalog, "_file", lambda: file)
        return file

    return write


def test_parts_from_the_package_index_are_joined(cache: Path, entry: Callable[..., Path]) -> None:
    entry()
    steps = []
    path = catalog.resolve("m", lambda *step: steps.append(step))
    assert path == cache / "models" / "m" / "body.gguf"
    assert path.read_bytes() == BODY
    assert not leftovers(cache)
    done = [step[1] for step in steps]
    assert done == sorted(done)
    assert steps[-1] == ("downloading m", len(BODY), len(BODY))
    catalog.verify("m")
    assert catalog.installed() == [catalog.Installed("m", path, len(BODY))]
    assert catalog.resolve("m", download=False) == path
    assert catalog.remove("m") == len(BODY)
    assert catalog.installed() == []


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sha256": "0" * 64}, FormatError, "found " + sha256(BODY)),
        ({"size": len(BODY) - 1}, FormatError, f"found more, expected {len(BODY) - 1} bytes"),
        ({"size": len(BODY) + 1}, FormatError, f"found {len(BODY)} bytes, expected {len(BODY) + 1} bytes"),
        ({"sources": ["pypi:half0==1.0/nowhere"]}, FormatError, "nowhere"),
        (
            {"sources": ["pypi:half2==1.0/data"]},
            ModelNotFound,
            "No matching distribution found for half2==1.0",
        ),
    ],
)
def test_what_is_not_as_the_catalog_says_is_refused(
    cache: Path, entry: Callable[..., Path], changes: dict, error: type[Exception], says: str
) -> None:
    entry(**changes)
    with pytest.raises(error, match=re.escape(says)):
        catalog.resolve("m")
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_offline_the_error_says_what_to_do(cache: Path, entry: Callable[..., Path], wheels: Path) -> None:
    entry()
    shutil.rmtree(wheels)
    with pytest.raises(ModelNotFound) as caught:
        catalog.resolve("m")
    told = str(caught.value)
    for hint in ("online", "path of a .gguf file", f"copy body.gguf from elsewhere (sha256 {sha256(BODY)})"):
        assert hint in told
    # ... and what it says works
    folder = Path(told.rsplit(" into ", 1)[1])
    folder.mkdir()
    (folder / "body.gguf").write_bytes(BODY)
    assert catalog.resolve("m").read_bytes() == BODY


def test_nothing_is_downloaded_unasked(cache: Path, entry: Callable[..., Path]) -> None:
    entry()
    with pytest.raises(ModelNotFound, match="`edgeq pull m`"):
        catalog.resolve("m", download=False)


def test_a_damaged_file_is_fetched_again(cache: Path, entry: Callable[..., Path]) -> None:
    entry()
    path = catalog.resolve("m")
    path.write_bytes(BODY[:-1])
    assert catalog.resolve("m").read_bytes() == BODY
    path.write_bytes(bytes(len(BODY)))
    with pytest.raises(FormatError, match="`edgeq rm m` and `edgeq pull m`"):
        catalog.verify("m")


def test_a_full_disk_is_seen_before_the_download(
    cache: Path, entry: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry()
    usage = shutil.disk_usage("/")._replace(free=fetch.SPARE + len(BODY))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EdgeqError, match="EDGEQ_CACHE"):
        catalog.resolve("m")


def test_several_processes_at_once(cache: Path, entry: Callable[..., Path]) -> None:
    code = (
        "import sys, pathlib; from edgeq import catalog; catalog._file = lambda: pathlib.Path(sys.argv[1]);"
    )
    code += "print(catalog.resolve('m'))"
    command = [sys.executable, "-c", code, str(entry())]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == BODY
    assert not leftovers(cache)


def test_what_killed_processes_left_is_cleared_away_a_week_later(tmp_path: Path) -> None:
    old, new = (tmp_path / f"{fetch.SCRATCH}{age}" for age in ("old", "new"))
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    with fetch.scratch(tmp_path):
        assert not old.exists()
        assert new.exists()


def test_a_file_beside_the_catalog_is_used_where_it_lies(cache: Path, entry: Callable[..., Path]) -> None:
    file = entry(sources=["tiny.gguf"])
    assert catalog.local("m") is None
    (file.parent / "tiny.gguf").write_bytes(BODY)
    assert catalog.resolve("m") == catalog.local("m") == file.parent / "tiny.gguf"
    with pytest.raises(ModelNotFound, match="not in the cache"):
        catalog.remove("m")


# A web server, which can break, change its mind, and play the Hugging Face Hub


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path; `cuts` holds the bytes after which the next answers break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/m.gguf": BODY}
        self.cuts: list[int] = []
        self.ranges = True
        self.tag: Callable[[bytes], str] = lambda body: f'"{sha256(body)}"'
        self.seen: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, urlsplit(self.path).path
        server.seen.append((path, self.headers["Range"]))
        if path not in server.files:
            self.send_error(404)
            return
        body, tag = server.files[path], server.tag(server.files[path])
        start = 0
        if server.ranges and self.headers["Range"] and self.headers["If-Range"] in (None, tag):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            stop = server.cuts.pop(0) if server.cuts else None
            self.wfile.write(body[start:stop])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "PAUSES", (0,) * 5)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_from_the_web(cache: Path, server: Server) -> None:
    steps = []
    path = catalog.resolve(
        f"{server.url}/m.gguf?download=true#sha256={sha256(BODY)}", lambda *s: steps.append(s)
    )
    assert path.name == "m.gguf"
    assert path.read_bytes() == BODY
    assert steps[-1][1:] == (len(BODY), len(BODY))
    assert catalog.resolve(f"{server.url}/m.gguf", download=False) == path
    assert catalog.installed() == [catalog.Installed(f"{server.url}/m.gguf", path, len(BODY))]
    assert catalog.remove(f"{server.url}/m.gguf") == len(BODY)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_again(cache: Path, server: Server, ranges: bool) -> None:
    server.cuts, server.ranges = [1_000_000, 2_500_001], ranges
    path = catalog.resolve(f"{server.url}/m.gguf#sha256={sha256(BODY)}")
    assert path.read_bytes() == BODY
    assert [r for _, r in server.seen] == [None, "bytes=1000000-", "bytes=2500001-"]


def test_a_connection_that_always_breaks_is_given_up(cache: Path, server: Server) -> None:
    server.cuts = [0] * 5
    with pytest.raises(ModelNotFound, match=f"closed after 0 of {len(BODY)} bytes"):
        catalog.resolve(f"{server.url}/m.gguf")
    assert not leftovers(cache)


def test_a_file_that_changes_on_the_way_is_refused(cache: Path, server: Server) -> None:
    server.cuts = [1_000_000]
    tags = iter(['"one"', '"two"'])
    server.tag = lambda body: next(tags)
    with pytest.raises(ModelNotFound, match="changed while it was being downloaded"):
        catalog.resolve(f"{server.url}/m.gguf")


def test_a_missing_file_is_not_asked_for_twice(cache: Path, server: Server) -> None:
    with pytest.raises(ModelNotFound, match="HTTP 404"):
        catalog.resolve(f"{server.url}/n.gguf")
    assert len(server.seen) == 1


def test_a_wrong_hash_is_refused(cache: Path, server: Server) -> None:
    with pytest.raises(FormatError, match="sha256"):
        catalog.resolve(f"{server.url}/m.gguf#sha256={'0' * 64}")
    assert catalog.installed() == []


@pytest.mark.parametrize("url", ["http://example.com/m.gguf", "http://127.0.0.1.example.com/m.gguf"])
def test_only_https_leaves_this_machine(cache: Path, url: str) -> None:
    with pytest.raises(EdgeqError, match="only https"):
        catalog.resolve(url)


# The Hugging Face Hub


GGUFS = [
    "README.md",
    "mmproj-model-Q4_K_M.gguf",
    "model-IQ4_XS.gguf",
    "model-Q4_K_M-00001-of-00002.gguf",
    "model-Q4_K_M-00002-of-00002.gguf",
    "model-Q4_K_S.gguf",
    "model-Q8_0.gguf",
    "sub/model-f16.gguf",
]


@pytest.mark.parametrize(
    ("names", "quant", "expected"),
    [
        (GGUFS, None, GGUFS[3:5]),
        (GGUFS, "Q8_0", ["model-Q8_0.gguf"]),
        (GGUFS, "q8_0", ["model-Q8_0.gguf"]),
        (GGUFS, "F16", ["sub/model-f16.gguf"]),
        (GGUFS, "Q4_K", []),
        (GGUFS, ".*", []),
        ([n for n in GGUFS if "Q4_K_M" not in n], None, ["model-Q8_0.gguf"]),
        (["b.gguf", "a.gguf"], None, ["a.gguf"]),
        (["../../Q8_0.gguf", "/Q8_0.gguf"], None, []),
        (["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors"], None,
         ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors"], "Q8_0", []),
        (["README.md"], None, []),
    ],
)  # fmt: skip
def test_the_file_for_a_quantization(names: list[str], quant: str | None, expected: list[str]) -> None:
    assert hub.choose(names, quant) == expected


@pytest.fixture
def hugging_face(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A Hub with the repository who/what, whose files all hold BODY."""
    pytest.importorskip("huggingface_hub")
    lfs = {"size": len(BODY), "sha256": sha256(BODY), "pointerSize": 100}
    listing = [{"rfilename": n, "size": len(BODY), "blobId": "0" * 40, "lfs": lfs} for n in GGUFS]
    info = {"id": "who/what", "modelId": "who/what", "sha": "0" * 40, "tags": [], "siblings": listing}
    server.files["/api/models/who/what"] = json.dumps(info).encode()
    server.files |= {f"/who/what/resolve/{'0' * 40}/{n}": BODY for n in GGUFS}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return server


def test_a_model_of_the_hub(cache: Path, hugging_face: Server) -> None:
    steps = []
    path = catalog.resolve("hf:who/what", lambda *step: steps.append(step))
    assert path.name == "model-Q4_K_M-00001-of-00002.gguf"
    assert path.read_bytes() == path.with_name("model-Q4_K_M-00002-of-00002.gguf").read_bytes() == BODY
    assert {step[0] for step in steps} >= {"downloading hf:who/what"}
    assert [i.name for i in catalog.installed()] == ["hf:who/what"]
    assert catalog.resolve("hf:who/what:F16").name == "model-f16.gguf"
    assert catalog.remove("hf:who/what") == 2 * len(BODY)
    assert not leftovers(cache)


def test_a_hub_that_has_it_not(cache: Path, hugging_face: Server) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing for Q2_K; it has .*model-Q8_0\.gguf"):
        catalog.resolve("hf:who/what:Q2_K")
    with pytest.raises(ModelNotFound, match="the Hugging Face Hub did not answer"):
        catalog.resolve("hf:who/else")
    with pytest.raises(EdgeqError, match="hf:USER/REPO"):
        catalog.resolve("hf:../what")


def test_a_hub_that_sends_something_else(cache: Path, hugging_face: Server) -> None:
    hugging_face.files[f"/who/what/resolve/{'0' * 40}/model-Q8_0.gguf"] = bytes(len(BODY))
    with pytest.raises(FormatError, match="sha256"):
        catalog.resolve("hf:who/what:Q8_0")
    assert catalog.installed() == []


def test_the_hub_s_address_is_taken_from_the_environment(cache: Path, hugging_face: Server) -> None:
    env = {**os.environ, "HF_ENDPOINT": hugging_face.url}
    command = [sys.executable, "-m", "edgeq", "pull", "hf:who/what:Q8_0"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).read_bytes() == BODY


# Names


def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalog.resolve(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    assert catalog.resolve("~/x.gguf") == tmp_path / "x.gguf"
    assert catalog.resolve(str(tmp_path)) == tmp_path


def test_an_unknown_name_is_corrected() -> None:
    with pytest.raises(ModelNotFound, match=r"did you mean smollm2\?"):
        catalog.resolve("smollm-2")


def test_removing_touches_nothing_outside_the_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    for name in (str(tmp_path / "x.gguf"), "..", ".", "", "/", fetch.SCRATCH):
        with pytest.raises(ModelNotFound):
            catalog.remove(name)
    assert (tmp_path / "x.gguf").exists()


def test_models_are_told_from_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    models = ["smollm2", "folder", "hf:who/what", "https://example.com/x", "missing.gguf", str(tmp_path)]
    prompts = ["Hello", "What is in x.gguf", "why?\0", "~nobody ever", "x" * 10_000, ""]
    assert all(map(catalog.is_model, models))
    assert not any(map(catalog.is_model, prompts))


def test_the_catalog_itself() -> None:
    assert catalog.default() in catalog.entries()
    for entry in catalog.entries().values():
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert entry.license
        assert all(re.fullmatch(r"pypi:[\w-]+==[\d.]+/\S+|nano\S*\.gguf", s) for s in entry.sources)


@pytest.mark.model
def test_the_default_model_is_what_the_catalog_says(smollm2_path: Path) -> None:
    catalog.verify("smollm2")
