"""The instruments, against Transformers and torch (see tools/make_perplexity_goldens.py) and by hand."""

import hashlib
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy

import edgeq
from edgeq import arch, cli, files
from edgeq.cli import perplexity as verb
from edgeq.errors import EdgeqError
from edgeq.evaluate import perplexity
from edgeq.evaluate.estimates import correlation, exp_mean, mean, quantile, root_mean_square
from edgeq.evaluate.perplexity import SLICE, Measurement, measure
from edgeq.evaluate.protocol import cut, joined_lines

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "perplexity.json").read_text())
LETTERS = "".join(map(chr, range(256, 256 + 128)))  # one for each token of the tiny models


@dataclass
class Letters:
    """A tokenizer whose tokens are the LETTERS."""

    bos_id: int | None = None

    @property
    def add_bos(self) -> bool:
        return self.bos_id is not None

    def encode(self, text: str) -> list[int]:
        return [self.bos_id] * self.add_bos + list(map(LETTERS.index, text))

    def token(self, id: int) -> str:
        return LETTERS[id]


def tiny(name: str = "llama", bos_id: int | None = None) -> Any:
    """A random model, and Letters."""
    model = arch.load(*files.read(FOLDER / "arch" / name), backend="numpy")
    return SimpleNamespace(model=model, tokenizer=Letters(bos_id))


TEXT = "".join(np.random.default_rng(0).choice(list(LETTERS), 100))


# Estimates


def test_means() -> None:
    x = np.array([1.0, 2, 3, 6])
    assert mean(x) == pytest.approx((3, math.sqrt(14 / 3 / 4)))  # Σ (x - 3)² = 14
    assert mean(x > 2) == pytest.approx((0.5, math.sqrt(0.5 * 0.5 / 3)))
    assert exp_mean(x) == pytest.approx((math.e**3, math.e**3 * math.sqrt(14 / 12)))
    assert exp_mean(1000 * x).value == math.inf
    assert root_mean_square(np.array([3.0, -3, 3, 3])) == (3, 0)
    assert root_mean_square(np.zeros(4)) == (0, 0)


def test_correlation() -> None:
    x = np.array([1.0, 2, 3, 4])
    assert correlation(x, -2 * x) == pytest.approx((-1, 0))
    assert correlation(x, np.array([1.0, -1, -1, 1])) == pytest.approx((0, 1 / math.sqrt(3)))
    assert all(map(math.isnan, correlation(x, np.ones(4))))


def test_quantiles() -> None:
    x = np.arange(101.0) ** 2
    assert quantile(x, 0.9).value == 90**2
    assert quantile(x, 0.5).value == 50**2
    assert math.isnan(quantile(x, 0.999).error)


def test_errors_are_what_repeated_measurements_show() -> None:
    rng = np.random.default_rng(0)
    many = rng.exponential(size=(2000, 400))
    for name, estimates in {
        "mean": [mean(x) for x in many],
        "exp": [exp_mean(x) for x in many],
        "rms": [root_mean_square(x) for x in many],
        "median": [quantile(x, 0.5) for x in many],
        "90 %": [quantile(x, 0.9) for x in many],
    }.items():
        values, errors = np.array(estimates).T
        assert errors.mean() == pytest.approx(values.std(), rel=0.08), name
    normal = rng.normal(size=(2000, 2, 200))
    values, errors = np.array([correlation(x, x + y) for x, y in normal]).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.08)


# Protocols


def test_llama_cpp_s_protocol() -> None:
    protocol, windows = cut(TEXT, Letters(bos_id=5), "llama.cpp", 16)
    ids = [5, *map(LETTERS.index, TEXT)]
    assert protocol.text_tokens == len(ids) == 101
    assert (protocol.ctx, protocol.chunks, protocol.bos) == (16, 6, "each chunk")
    assert (protocol.first_scored, protocol.scored) == (9, 6 * 7)
    assert windows[:, 1:].tolist() == np.reshape(ids[:96], (6, 16))[:, 1:].tolist()
    assert windows[:, 0].tolist() == [5] * 6
    assert protocol.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_the_protocol_of_the_papers() -> None:
    protocol, windows = cut(TEXT, Letters(bos_id=5), "gptq", 32, 2)
    assert (protocol.chunks, protocol.bos, protocol.first_scored, protocol.scored) == (2, "text", 1, 62)
    assert windows.ravel().tolist() == [5, *map(LETTERS.index, TEXT)][:64]
    # rows of the data set: " = A = \n", "", " b \n", ""
    assert joined_lines(" = A = \n \n b \n \n") == " = A = \n\n\n\n\n b \n\n\n"


def test_without_bos() -> None:
    for name in ("llama.cpp", "gptq"):
        protocol, windows = cut(TEXT, Letters(), name, 50)
        assert protocol.bos == "none"
        assert windows.ravel().tolist() == list(map(LETTERS.index, TEXT))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "mine"}, "llama.cpp, gptq"),
        ({"ctx": 7}, "at least 8"),
        ({"chunks": 0}, "at least 1"),
        ({}, "the text has 100 tokens, and a chunk takes 512"),
    ],
)
def test_what_cannot_be_cut(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, EdgeqError), match=says):
        cut(TEXT, Letters(), **{"name": "llama.cpp", **options})


# Measurements


@pytest.mark.parametrize(("protocol", "first"), [("llama.cpp", 25), ("gptq", 1)])
def test_the_right_tokens_are_scored(protocol: str, first: int) -> None:
    golden = np.load(FOLDER / "arch" / "llama" / "golden.npz")
    ids, logits = golden["ids"], golden["logits"].astype(np.float64)
    assert (len(ids) - first) % SLICE  # the last slice is shorter
    nll = [
        math.log(sum(math.exp(x) for x in logits[i - 1])) - logits[i - 1][ids[i]]
        for i in range(first, len(ids))
    ]
    text = "".join(LETTERS[i] for i in ids)
    measured = edgeq.perplexity(tiny(), text, protocol=protocol, ctx=48)
    np.testing.assert_allclose(measured.nll, nll, atol=1e-4)
    assert measured.perplexity.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert list(measured.estimates) == ["ppl"]


def test_few_logits_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    llm = tiny()
    head = llm.model.head
    monkeypatch.setattr(llm.model, "head", lambda hidden: seen.append(len(hidden)) or head(hidden))
    measured = edgeq.perplexity(llm, TEXT, ctx=50)
    assert sum(seen) == len(measured.nll) == 2 * 24
    assert max(seen) == SLICE


def test_a_model_does_not_differ_from_itself() -> None:
    measured = edgeq.perplexity(tiny(), TEXT, base=tiny(), ctx=50)
    assert measured.kld.tolist() == [0] * 48
    assert measured.same_top.all()
    found = measured.estimates
    assert found["ppl"] == found["ppl_base"]
    assert found["ppl_ratio"] == (1, 0)
    assert found["same_top"] == (1, 0)


def test_it_is_measured_chunk_by_chunk() -> None:
    llm = tiny(bos_id=3)
    told = []
    whole = edgeq.perplexity(llm, TEXT, ctx=16, progress=lambda *x: told.append(x))
    assert told == [("measuring", done, 6) for done in range(7)]
    *_, some = islice(measure(llm, *cut(TEXT, llm.tokenizer, "llama.cpp", 16)), 3)
    assert some.protocol.chunks == 3
    assert some.nll.tolist() == whole.nll[: 3 * 7].tolist()
    assert edgeq.perplexity(llm, TEXT, ctx=16, chunks=3).protocol == some.protocol


def test_vocabularies_have_to_agree(stories260k: Path) -> None:
    says = "128 tokens and the base 512"
    with edgeq.load(stories260k, backend="numpy") as other, pytest.raises(EdgeqError, match=says):
        edgeq.perplexity(tiny(), TEXT, base=other, ctx=16)
    other = tiny()
    other.tokenizer.token = lambda id: "x"
    with pytest.raises(EdgeqError, match="'x' to the base"):
        edgeq.perplexity(tiny(), TEXT, base=other, ctx=16)


def test_broken_models_are_told() -> None:
    llm = tiny()
    llm.model.network.norm = np.full_like(llm.model.network.norm, np.nan)
    with pytest.raises(EdgeqError, match="the base computes logits that are not finite"):
        edgeq.perplexity(tiny(), TEXT, base=llm, ctx=16)
    with pytest.raises(ValueError, match="at most 512, the limit of the model"):
        edgeq.perplexity(tiny(), TEXT * 10, ctx=1000)


# Against Transformers


def golden_cases(model: str) -> list[Any]:
    cases = [case for case in GOLDEN["cases"] if case["model"] == model]
    return [pytest.param(case, id=case["protocol"]) for case in cases]


def golden_text(shared: Path, case: dict[str, Any]) -> str:
    data = (shared / "data" / "text" / case["text"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == case["text_sha256"]
    return data.decode()[: GOLDEN["characters"]]


def as_asked(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in ("protocol", "ctx", "chunks")}


def check(measured: Measurement, case: dict[str, Any], rel: float) -> None:
    for key, (value, error) in case["estimates"].items():
        found = measured.estimates[key]
        assert found.value == pytest.approx(value, rel=rel), key
        if error is not None:
            assert found.error == pytest.approx(error, rel=rel), key


@pytest.fixture
def coarse260k(stories260k: Path, tmp_path: Path) -> Path:
    """stories260k with 4 bits left of the fractions of its matrices' numbers."""
    folder = tmp_path / "coarse"
    shutil.copytree(stories260k, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for w in weights.values():
        if w.ndim == 2:
            w.view(np.int32)[...] &= -(1 << 19)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", golden_cases("stories260k"))
def test_stories260k(shared: Path, stories260k: Path, coarse260k: Path, case: dict[str, Any]) -> None:
    llm, base = (edgeq.load(path, backend="numpy") for path in (stories260k, coarse260k))
    with llm, base:
        measured = edgeq.perplexity(llm, golden_text(shared, case), base=base, **as_asked(case))
    check(measured, case, rel=1e-4)


@pytest.mark.model
@pytest.mark.parametrize("case", golden_cases("smollm2"))
def test_smollm2(shared: Path, smollm2_path: Path, case: dict[str, Any]) -> None:
    fast, exact = (edgeq.load(smollm2_path, backend=backend) for backend in ("numba", "numpy"))
    with fast, exact:
        measured = edgeq.perplexity(fast, golden_text(shared, case), base=exact, **as_asked(case))
    assert measured.estimates["ppl_base"] == pytest.approx(case["estimates"]["ppl"], rel=1e-4)
    assert measured.estimates["ppl_ratio"].value == pytest.approx(1, abs=0.01)
    assert measured.estimates["kld_mean"].value < 0.004


# The command


def run(*words: object) -> None:
    cli.edgeq.main(list(map(str, words)), standalone_mode=False)


def test_the_command(
    shared: Path, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (shared / "data" / "text" / "tinystories.txt").read_bytes()[:2000].replace(b"\n", b"\r\n")
    (tmp_path / "text").write_bytes(text)
    words = ["perplexity", "-m", stories260k, "-f", tmp_path / "text", "-c", 64, "--chunks", 3]
    run(*words, "--backend", "numpy", "--base-backend", "numpy")
    out = capsys.readouterr().out
    for shown in (
        hashlib.sha256(text).hexdigest(),
        "llama.cpp, 3 chunks of 64 tokens, tokens 33 to 63 of each scored, 93 in all, BOS: each chunk",
        "base: ",
        "Mean PPL(Q)-PPL(base)",
        "Mean KLD",
    ):
        assert shown in out
    assert out.count("\n") == 5 + 2 + len(verb.LABELS)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A measurement of a tiny model on TEXT."""
    monkeypatch.setattr(verb, "open_model", lambda path, **options: nullcontext(tiny()))
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return ["perplexity", "-m", FOLDER / "arch" / "llama", "-f", tmp_path / "text", "-c", 20]


def test_the_command_for_programs(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    run(*words, "--json", "--protocol", "gptq", "--chunks", 3, "--base", words[2], "--backend", "numpy")
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"]["name"] == "gptq"
    assert found["protocol"]["scored"] == 3 * 19
    assert found["estimates"]["kld_mean"] == {"value": 0, "error": 0}
    assert found["estimates"]["kld_maximum"] == {"value": 0, "error": None}
    assert list(found["estimates"]) == list(verb.LABELS)
    assert (found["model"], found["base_backend"]) == (str(words[2]), "numpy")


def test_the_command_without_a_base(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    run(*words)
    out = capsys.readouterr().out
    assert "5 chunks of 20 tokens" in out
    assert f"{edgeq.perplexity(tiny(), TEXT, ctx=20).perplexity.value:.6f}" in out
    assert "base" not in out


def test_ctrl_c_shows_what_was_measured(
    words: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed_after(chunks: int) -> Any:
        def interrupted(*args: Any) -> Any:
            yield from islice(measure(*args), chunks)
            raise KeyboardInterrupt

        return interrupted

    monkeypatch.setattr(perplexity, "measure", pressed_after(2))
    with pytest.raises(click.Abort):
        run(*words)
    out, err = capsys.readouterr()
    assert "2 chunks of 20 tokens" in out
    assert "stopped after 2 of 5 chunks" in err
    monkeypatch.setattr(perplexity, "measure", pressed_after(0))
    with pytest.raises(click.Abort):
        run(*words)
    assert capsys.readouterr().out == ""


def test_wrong_usage(words: list[object], tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="ctx is 4"):
        run(*words, "-c", 4)
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(EdgeqError, match="not UTF-8: .* at byte 3"):
        run(*words)
