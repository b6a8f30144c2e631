"""The models in models/: without a network they say what llama.cpp lets them say."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import edgeq
from edgeq import catalog, cli, files
from edgeq.evaluate.perplexity import log_softmax

GOLDEN = json.loads((Path(__file__).parent / "golden" / "nano.json").read_text())
NAMES = ("nano", "nano-ternary")
NEAR = {
    "nano": 0.02,
    "nano-ternary": 0.1,
}  # nats; both round inputs of ternary matrices to 8 bits, differently


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def install(name, progress):
        raise AssertionError(f"{name} is to be fetched")

    monkeypatch.setattr(catalog, "_install", install)


@pytest.fixture(scope="module", params=NAMES)
def llm(request):
    with edgeq.load(catalog.resolve(request.param)) as llm:
        llm.told, llm.near = GOLDEN[request.param], NEAR[request.param]
        yield llm


@pytest.mark.parametrize("name", NAMES)
def test_they_lie_beside_the_catalog(name):
    path = catalog.resolve(name, download=False)
    assert path.parent == catalog._file().parent
    catalog.verify(name)
    _, tensors = files.read(path)
    kinds = {t.format for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    assert kinds == {"f16" if name == "nano" else "tq2_0"}


def test_the_catalog_shows_that_they_are_here():
    rows = CliRunner().invoke(cli.edgeq, ["list"]).output.splitlines()
    assert [row.split()[0] for row in rows if " yes " in row][:2] == list(NAMES)


def test_likelihoods_are_those_of_llama_cpp(llm):
    ids = llm.tokenizer.encode(GOLDEN["text"])
    assert ids == llm.told["ids"]
    logits = llm.model(ids[:-1], llm.model.new_cache(len(ids)), "all")
    nll = -log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    assert abs(nll - llm.told["nll"]).max() < llm.near
    assert nll.mean() == pytest.approx(np.mean(llm.told["nll"]), abs=0.01)
    assert nll.mean() < 2.6  # they were trained on such texts


def test_answers_are_those_of_llama_cpp(llm):
    answer = llm.generate(GOLDEN["beginning"], max_tokens=GOLDEN["tokens"], temperature=0)
    assert answer == llm.told["answer"]


def test_the_command_line_needs_no_network():
    words = ["run", "nano", GOLDEN["beginning"], "-n", str(GOLDEN["tokens"]), "--temp", "0"]
    result = CliRunner().invoke(cli.edgeq, words)
    assert result.exit_code == 0, result.output
    assert GOLDEN["nano"]["answer"].strip() in result.output
