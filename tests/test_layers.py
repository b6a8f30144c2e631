"""The order of the rooms: imports point one way, and nothing heavy is imported before it is used."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgeq"

# A room may import from its own line and from those below it.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"memory"},
    {"__init__", "llm", "quantizers", "train"},
    {"chat", "calibrate", "evaluate", "generate", "catalog", "template", "sample", "convert"},
    {"fetch", "files", "hub", "sandbox", "tokenizer"},
    {"arch"},
    {"kernels"},
    {"formats"},
    {"observers"},
    {"additive", "powers", "ranges", "rounding", "search", "uniform"},
    {"errors", "grid", "inputs", "paths", "tensor"},
]
HEIGHT = {room: len(LAYERS) - i for i, layer in enumerate(LAYERS) for room in layer}


def imports(file: Path) -> Iterator[str]:
    """Full names of what a module imports, at its top or inside functions."""
    package = file.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], node.module] if node.level else [node.module]
            yield from (".".join([*filter(None, base), alias.name]) for alias in node.names)


def room(name: str) -> str:
    """The file or folder of edgeq that a name belongs to; __init__ if it is no module's."""
    first = (name.split(".") + ["", ""])[1]
    return first if first in HEIGHT else "__init__"


MODULES = sorted(PACKAGE.rglob("*.py"))
EDGES = [
    (room(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)), room(name), file, name)
    for file in MODULES
    for name in imports(file)
    if name.split(".")[0] == "edgeq"
]


def test_every_room_has_its_place() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms == set(HEIGHT)


def test_imports_point_one_way() -> None:
    upward = [f"{file.relative_to(PACKAGE)}: {name}" for a, b, file, name in EDGES if HEIGHT[a] < HEIGHT[b]]
    assert upward == []


def test_no_rooms_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for a, b, *_ in EDGES:
        if a != b:
            graph.setdefault(a, set()).add(b)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_kernels_know_numba() -> None:
    knowing = {
        file.relative_to(PACKAGE).parts[0]
        for file in MODULES
        if any(name.split(".")[0] in ("numba", "llvmlite") for name in imports(file))
    }
    assert knowing == {"kernels"}


def loaded(code: str) -> set[str]:
    """Names of the modules that a new Python has loaded after running some code."""
    program = f"{code}\nimport sys; print(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_cheap() -> None:
    modules = loaded("import edgeq; dir(edgeq); edgeq.FormatError, edgeq.__version__")
    assert not modules & {"numba", "numpy", "edgeq.kernels", "edgeq.llm"}


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--help"]])
def test_help_is_cheap(words: list[str]) -> None:
    modules = loaded(f"from edgeq.cli import edgeq\nedgeq.main({words}, standalone_mode=False)")
    assert not modules & {"numba", "numpy", "edgeq.kernels", "edgeq.llm", "rich", "jinja2"}


def test_the_numpy_backend_does_without_numba() -> None:
    folder = Path(__file__).parent / "golden" / "arch" / "llama"
    code = f"""
import edgeq.llm
from edgeq import arch, files
model = arch.load(*files.read({str(folder)!r}), backend="numpy")
model([1, 2], model.new_cache(2))"""
    modules = loaded(code)
    assert "edgeq.kernels.numpy_backend" in modules
    assert not modules & {"numba", "llvmlite"}
