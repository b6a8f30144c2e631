"""compare: its numbers are those of the commands, its page is the JSON's, and it goes on where it stopped."""

import contextlib
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest
from folders import complete

import edgeq
from edgeq import cli, files
from edgeq.errors import EdgeqError
from edgeq.evaluate import laboratory
from edgeq.evaluate.chart import Axis, Point, Series, axis, chart
from edgeq.evaluate.compare import Comparison, compare, layer_of, names, together
from edgeq.evaluate.page import COLUMNS, page

Runs = list[tuple[str, Sequence[str]]]


def run(*words: object) -> str:
    """What a command of edgeq prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.edgeq.main(list(map(str, words)), standalone_mode=False)
    return out.getvalue()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    """The commands that are run; in this process, and without the compiler."""
    made: Runs = []

    def execute(verb: str, words: Sequence[str], *, quiet: bool) -> str:
        made.append((verb, words))
        return run(verb, *words, *(["--backend", "numpy"] if verb in ("perplexity", "bench") else []))

    monkeypatch.setattr(laboratory, "execute", execute)
    monkeypatch.setattr("edgeq.evaluate.compare.SHORT", math.inf)
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def asked(stories260k: Path, shared: Path, tmp_path: Path) -> dict[str, Any]:
    """A small comparison."""
    text = tmp_path / "text"
    text.write_bytes((shared / "data" / "text" / "tinystories.txt").read_bytes()[:4000])
    return {
        "base": stories260k, "types": ["q8_0", "q4_0"], "text": text, "ctx": 64, "chunks": 3,
        "prompt": 8, "gen": 4, "threads": 1, "state": tmp_path / "state.json",
    }  # fmt: skip


def test_its_numbers_are_those_of_the_commands(runs: Runs, asked: dict[str, Any]) -> None:
    found = compare(**asked)
    base, large, small = found.rows
    assert [row["name"] for row in found.rows] == ["stories260k", "q8_0", "q4_0"]
    path = Path(small["path"])
    assert small["bytes"] == path.stat().st_size < large["bytes"] < base["bytes"]
    assert {t.format for t in files.read(path)[1].values()} == small["formats"].keys() == {
        "q4_0", "q8_0", "f16", "f32",
    }  # fmt: skip
    with (
        edgeq.load(asked["base"], backend="numpy") as llm,
        edgeq.load(path, backend="numpy") as other,
    ):
        text = asked["text"].read_text(encoding="utf-8")
        measured = edgeq.perplexity(other, text, base=llm, ctx=64, chunks=3)
    for key, estimate in measured.estimates.items():
        assert small["estimates"][key]["value"] == pytest.approx(estimate.value, rel=1e-6), key
    assert base["estimates"].keys() == {"ppl"}
    assert base["estimates"]["ppl"]["value"] == pytest.approx(small["estimates"]["ppl_base"]["value"])
    assert base["weight_error"] is None
    assert 0.05 < small["weight_error"] < 0.1
    assert list(small["layers"]) == ["embedding", *map(str, range(5))]
    assert small["quantize_seconds"] > 0
    for row in found.rows:
        assert row["decode"]["value"] > 0
        assert row["peak_memory"] > 1e7
    assert found.about["protocol"]["scored"] == 3 * 31
    bench = [words[1] for verb, words in runs if verb == "bench"]
    assert bench == [row["path"] for row in found.rows] * 3  # in turn


def test_it_goes_on_where_it_stopped(
    runs: Runs, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = laboratory.execute

    def interrupted(verb: str, words: Sequence[str], *, quiet: bool) -> str:
        if sum(verb == "perplexity" for verb, _ in runs) == 2:
            raise KeyboardInterrupt
        return execute(verb, words, quiet=quiet)

    monkeypatch.setattr(laboratory, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(**asked)
    done = len(runs)
    monkeypatch.setattr(laboratory, "execute", execute)
    told: list[tuple[Any, ...]] = []
    found = compare(**asked, progress=lambda *x: told.append(x))
    again = [verb for verb, _ in runs[done:] if verb != "--version"]
    assert again == ["perplexity"] + ["bench"] * 9
    assert [stage for stage, *_ in told][:2] == ["perplexity q4_0", "bench stories260k"]
    assert all(d < total and left > 0 for _, d, total, left in told)
    done = len(runs)
    assert compare(**asked).rows == found.rows
    assert len(runs) == done + 1
    asked["text"].write_bytes(asked["text"].read_bytes()[1:])  # another text
    compare(**asked)
    assert [verb for verb, _ in runs[done + 2 :]] == ["perplexity"] * 3


def test_other_methods(runs: Runs, asked: dict[str, Any]) -> None:
    more = asked | {"types": ["q4_1"], "methods": ["rtn", "hqq"], "calibration": asked["text"], "pieces": 2}
    found = compare(**more)
    assert [row["name"] for row in found.rows] == ["stories260k", "q4_1", "q4_1 hqq"]
    assert found.rows[1]["sha256"] != found.rows[2]["sha256"]
    look = ["--method", "hqq", "--calibration", str(asked["text"]), "--chunks", "2"]
    made = [list(words) for verb, words in runs if verb == "quantize" and "--dry-run" not in words]
    assert [words[3:9] == look for words in made] == [False, False, True, True]
    done = len(runs)
    compare(**more)
    assert [verb for verb, _ in runs[done:]] == ["--version"]
    compare(**more | {"pieces": 3})
    assert [verb for verb, words in runs[done:] if "--dry-run" not in words].count("quantize") == 2


def test_folders(runs: Runs, asked: dict[str, Any], tmp_path: Path) -> None:
    """Integers in groups, and methods that have a type of their own."""
    more = {"base": complete("llama", tmp_path / "base"), "types": ["i4-g32-asym"], "methods": ["rtn", "hqq"]}
    found = compare(**asked | more, folders=["dynamic"])
    assert [row["name"] for row in found.rows] == ["base", "i4-g32-asym", "i4-g32-asym hqq", "dynamic"]
    assert [row["type"] for row in found.rows] == [None, "i4-g32-asym", "i4-g32-asym", None]
    for row, format in zip(found.rows[1:], ("i4", "i4", "i8"), strict=True):
        assert max(row["formats"], key=row["formats"].get) in (format, "f16", "f32")
        assert format in row["formats"]
        assert Path(row["path"]).is_dir()
        assert 0 < row["weight_error"] < 0.1
        assert row["estimates"]["kld_mean"]["value"] < 0.5
    done = len(runs)
    assert compare(**asked | more, folders=["dynamic"]).rows == found.rows
    assert len(runs) == done + 1
    page(found.about, found.rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"types": ["q4_1", "q4_0"], "methods": ["hqq"]}, "no matrix gets a type with offsets"),
        ({"types": ["i4-g32"]}, "172 columns, which are no whole groups of 32"),
        ({"types": ["i4"], "methods": ["imatrix"], "imatrix": __file__}, "is for all layers of a folder"),
        ({"methods": ["aqlm"]}, "GGUF files have no type for aqlm"),
    ],
)
def test_what_cannot_be_made_is_said_first(
    runs: Runs, asked: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises((EdgeqError, click.UsageError), match=says):
        compare(**asked | changes)
    assert all("--dry-run" in words for verb, words in runs if verb != "--version")


def test_a_lost_file_is_made_again(runs: Runs, asked: dict[str, Any]) -> None:
    path = Path(compare(**asked).rows[1]["path"])
    path.unlink()
    done = len(runs)
    compare(**asked)
    assert path.exists()
    assert {verb for verb, _ in runs[done:]} == {"--version", "quantize"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"types": ()}, "nothing to compare"),
        ({"methods": ["imatrix"]}, "needs an importance matrix"),
    ],
)
def test_what_cannot_be_compared(
    runs: Runs, asked: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        compare(**asked | changes)


def test_a_foreign_state_is_not_overwritten(runs: Runs, asked: dict[str, Any]) -> None:
    for text in ("text", "[1]", '{"a": 1}', '{"a": {}}'):
        asked["state"].write_text(text)
        with pytest.raises(EdgeqError, match="does not hold results"):
            compare(**asked)
        assert asked["state"].read_text() == text


def test_commands_run_in_processes_of_their_own(tmp_path: Path) -> None:
    assert laboratory.execute("--version", [], quiet=True) == f"edgeq, version {edgeq.__version__}\n"
    (tmp_path / "bad.gguf").write_text("text")
    verdict = json.loads(laboratory.execute("verify", [str(tmp_path / "bad.gguf"), "--json"], quiet=True))
    assert not verdict["sound"]
    with pytest.raises(EdgeqError, match=r"edgeq inspect .*bad.gguf failed: .*expected a GGUF file"):
        laboratory.execute("inspect", [str(tmp_path / "bad.gguf")], quiet=True)


def test_names_and_layers() -> None:
    paths = [Path("a/model.gguf"), Path("b/model.gguf"), Path("c/other.gguf"), Path("folder")]
    assert names(paths) == ["a/model", "b/model", "other", "folder"]
    assert layer_of("blk.12.ffn_up.weight") == layer_of("model.layers.12.mlp.up_proj.weight") == "12"
    assert layer_of("token_embd.weight") == layer_of("model.embed_tokens.weight") == "embedding"
    assert layer_of("output.weight") == layer_of("lm_head.weight") == "output"
    assert together([(0.1, 3), (0.3, 1)]) == pytest.approx(((3 * 0.01 + 0.09) / 4) ** 0.5)
    assert together([]) is None


# The page


def row(name: str, kld: float | None = None, **more: Any) -> dict[str, Any]:
    """A model with made-up numbers."""
    estimates = {"ppl": {"value": 20.5, "error": 0.5}}
    if kld is not None:
        estimates |= {
            "kld_mean": {"value": kld, "error": kld / 20},
            "same_top": {"value": 0.9123, "error": 0.004},
            "dp_rms": {"value": 0.05, "error": None},
        }
    return {
        "name": name, "path": f"/models/{name}.gguf", "sha256": {f"{name}.gguf": "0" * 64}, "problems": [],
        "bytes": 90_000_000, "parameters": 1e8, "bits_per_weight": 4.5, "formats": {"q4_0": 9e7},
        "quantize_seconds": None, "weight_error": None if kld is None else 0.08,
        "layers": {} if kld is None else {"embedding": 0.01, "0": 0.08, "1": 0.09},
        "prefill": {"value": 501.25, "error": 20.0}, "decode": {"value": 80.5, "error": 3.0},
        "peak_memory": 3e8, "commands": [f"edgeq verify '{name}'"], "estimates": estimates,
    } | more  # fmt: skip


def comparison(*models: dict[str, Any]) -> Comparison:
    about = {
        "edgeq_version": "0", "date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "A<B", "threads": 2},
        "text": "wiki.txt", "speed": {"prompt": 512, "gen": 64, "rounds": 3, "repetitions": 2},
        "protocol": {
            "name": "llama.cpp", "text_sha256": "ab" * 32, "text_tokens": 9999, "ctx": 512, "chunks": 40,
            "first_scored": 257, "bos": "none", "scored": 10200,
        },
    }  # fmt: skip
    return Comparison(about, [row("base"), *models])


def rendered(found: Comparison) -> str:
    return page(found.about, found.rows)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what is asked of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def lookup(row: dict[str, Any], key: str) -> float:
    for part in key.split("."):
        row = row[part]
    return row["value"] if isinstance(row, dict) else row


def test_the_page_s_numbers_are_the_json_s(tmp_path: Path) -> None:
    found = comparison(row("b", 0.05, bytes=70_000_000), row("a", 0.0123, quantize_seconds=1.5))
    found.save(tmp_path / "x.html")
    found.save(tmp_path / "x.json")
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored == {"about": found.about, "models": found.rows}
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    shown = Page(text)
    ordered = [stored["models"][i] for i in (0, 2, 1)]  # the base, then by distance
    cells = [a for tag, a in shown.tags if tag == "td"]
    assert len(cells) == 3 * len(COLUMNS)
    for i, cell in enumerate(cells):
        if "data-value" in cell:
            expected = lookup(ordered[i // len(COLUMNS)], str(cell["data-key"]))
            assert float(str(cell["data-value"])) == expected
            assert cell["data-key"] == COLUMNS[i % len(COLUMNS)].key
    assert sum("data-value" in c for c in cells) == 3 * len(COLUMNS) - 5 - 1  # no KLD of the base, ...
    dots = [a for tag, a in shown.tags if tag == "circle"]
    for dot in dots[:2]:
        model = next(m for m in ordered if m["name"] == dot["data-name"])
        assert float(str(dot["data-x"])) == pytest.approx(model["bytes"] / 1e6)
        assert float(str(dot["data-y"])) == model["estimates"]["kld_mean"]["value"]
    assert [float(str(d["data-y"])) for d in dots[4:7]] == pytest.approx([1, 8, 9])
    assert "0.0123 <small>± 0.0006</small>" in text
    assert "91.2 <small>± 0.4</small>" in text


def test_the_page_stands_alone() -> None:
    text = rendered(comparison(row("a", 0.01)))
    shown = Page(text)
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not re.search(r"https?://|url\(|@import|\bsrc=|\bhref=|\bon\w+=", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "A&lt;B" in text


def test_names_cannot_change_the_page() -> None:
    evil = "<script>alert('x')</script>\"><b>"
    ill = row(evil, 0.1, problems=["<i>broken"])
    text = rendered(comparison(ill))
    shown = Page(text)
    assert "script" not in {tag for tag, _ in shown.tags}
    assert "&lt;i&gt;broken" in text


def test_pictures_can_be_read_aloud() -> None:
    text = rendered(comparison(row("a", 0.01), row("b", 0.2)))
    drawn = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(drawn) == 3
    for svg in drawn:
        assert svg.get("role") == "img"
        assert svg.findtext("title")
        assert "a" in svg.findtext("desc", "")
    titles = [t.text for svg in drawn for t in svg.iter("text") if t.get("class") == "title"]
    assert titles == [
        "Size (MB)", "Mean KL divergence from the base (nats)",
        "Speed of answers (tokens/s)", "Mean KL divergence from the base (nats)",
        "Layer", "Relative error of the weights (%)",
    ]  # fmt: skip


@pytest.mark.parametrize("kld", [0.0, 1e-9, 3.0])
def test_extreme_values_are_drawn(kld: float) -> None:
    many = [row(f"m{i}", kld * (i + 1), bytes=10**7, layers={"0": 0.1}) for i in range(12)]
    text = rendered(comparison(*many))
    assert "nan" not in text.lower().replace("quantiz", "")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for circle in ET.fromstring(svg).iter("circle"):
            assert 0 <= float(circle.get("cx", "")) <= 760
            assert 0 <= float(circle.get("cy", "")) <= 420


def test_axes() -> None:
    x = axis("x", [0.001, 0.9], log=True)
    assert x.share(0.001) == pytest.approx(1 - x.share(0.9))
    assert [label for _, label in x.ticks()][:4] == ["0.001", "0.002", "0.005", "0.01"]
    assert [label for _, label in axis("x", [90.0, 272], zero=True).ticks()] == [
        "0", "50", "100", "150", "200", "250",
    ]  # fmt: skip
    assert Axis("x", 0, 10).share(5) == 0.5
    assert axis("x", [3.0, 3]).low < 3 < axis("x", [3.0, 3]).high


def test_names_do_not_cover_each_other() -> None:
    x, y = Axis("x", 0, 100), Axis("y", 0, 100)
    near = [Series(f"model number {i}", i, [Point(50 + i, 50 + 2 * i)]) for i in range(6)]
    for series in (near, [s._replace(line=True, points=[Point(0, 5), *s.points]) for s in near]):
        svg = ET.fromstring(chart("t", "d", x, y, series))
        texts = [t for t in svg.iter("text") if (t.text or "").startswith("model")]
        heights = sorted(float(t.get("y", "")) for t in texts)
        assert len(heights) == 6
        assert len({(t.get("x"), t.get("y")) for t in texts}) == 6
        if series is not near:
            assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 15


# The command


def test_the_command(runs: Runs, asked: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    words = [asked["base"], "-f", asked["text"], "-c", 64, "--chunks", 2, "-p", 8, "-n", 4, "-t", 1]
    output = tmp_path / "page.html"
    out = run("compare", *words, "--types", "q8_0", "-o", output)
    assert "llama.cpp, 2 chunks of 64 tokens, tokens 33 to 63 of each scored, 62 in all" in out
    assert "q8_0" in out
    stored = json.loads(output.with_suffix(".json").read_text())
    assert f"{stored['models'][1]['bytes']:,}" in out
    assert "[1/" in capsys.readouterr().err
    assert "<html" in output.read_text(encoding="utf-8")
    assert json.loads(run("compare", *words, "--types", "q8_0", "-o", output, "--json")) == {
        **stored, "about": stored["about"] | {"date": json.loads(
            output.with_suffix(".json").read_text())["about"]["date"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--bits", "5"], "--bits are 8, 4, 3, 2"),
        (["--bits", "4", "--methods", "aqlm"], "aqlm has a type of its own, without --types or --bits"),
        (["-o", "page.pdf"], "ends in .html"),
        ([], "nothing to compare"),
        (["--types", "q8_0", "--methods", "awq+x"], "unknown method 'x'"),
    ],
)
def test_wrong_usage(runs: Runs, asked: dict[str, Any], more: list[str], says: str) -> None:
    with pytest.raises(click.UsageError, match=says):
        run("compare", asked["base"], "-f", asked["text"], *more)
