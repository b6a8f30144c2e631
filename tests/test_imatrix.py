"""Importance matrices: measured against llama-imatrix (see tools/check_imatrix.py) and by hand, written and
read."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from folders import GOLDEN, complete

import edgeq
from edgeq import arch, calibrate, cli, files, formats
from edgeq.errors import EdgeqError, FormatError
from edgeq.files import imatrix
from edgeq.files.imatrix import Imatrix, Squares, merge, read, write

LLAMA_CPP = GOLDEN.parent / "imatrix.gguf"
CTX, CHUNKS, CHARACTERS = 128, 6, 4000


def tiny(name="llama"):
    return arch.load(*files.read(GOLDEN / name), backend="numpy")


def some(seed=0, matrices=1, chunks=3, chunk_size=64):
    """An importance matrix of random numbers."""
    rng = np.random.default_rng(seed)
    counts = np.full((matrices, 1), chunks * chunk_size, np.float64)
    squares = {
        name: Squares(rng.exponential(100, (matrices, 8)).astype(np.float32).astype(np.float64), counts)
        for name in ("blk.1.attn_q.weight", "blk.0.ffn_down.weight")
    }
    return Imatrix(squares, ["c4.txt"], chunks, chunk_size)


def same(a, b, rtol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol)


# Measured


def test_llama_imatrix_measures_the_same(stories260k, shared):
    text = (shared / "data" / "text" / "tinystories.txt").read_text(encoding="utf-8")[:CHARACTERS]
    theirs = read(LLAMA_CPP)
    with edgeq.load(stories260k, backend="numpy") as llm:
        ours = edgeq.imatrix(llm, text, ctx=CTX, chunks=CHUNKS, dataset="tinystories.txt")
    assert (ours.datasets, ours.chunks, ours.chunk_size) == (["tinystories.txt"], CHUNKS, CTX)
    assert (theirs.datasets, theirs.chunks, theirs.chunk_size) == (["tinystories.txt"], CHUNKS, CTX)
    assert {n: s.counts.item() for n, s in ours.squares.items()} == dict.fromkeys(
        theirs.squares, CHUNKS * CTX
    )
    same(ours.importance, theirs.importance, rtol=0.01)


def test_compiled_kernels_measure_the_same(stories260k, shared):
    text = (shared / "data" / "text" / "tinystories.txt").read_text(encoding="utf-8")[:CHARACTERS]
    with edgeq.load(stories260k) as llm:
        ours = edgeq.imatrix(llm, text, ctx=CTX, chunks=CHUNKS)
    same(ours.importance, read(LLAMA_CPP).importance, rtol=0.02)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "qwen3"])
def test_every_matrix_of_the_layers_is_measured(name):
    model = tiny(name)
    *_, squares = calibrate.measure(model, np.arange(32).reshape(2, 16), output=True)
    _, _, tensors = arch.identify(*files.read(GOLDEN / name), GOLDEN)
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    wanted = {n for n, t in tensors.items() if len(t.shape) == 2 and n.startswith("blk.")} | {head}
    assert squares.keys() == wanted
    assert {n: s.sums.shape for n, s in squares.items()} == {n: (1, tensors[n].cols) for n in wanted}
    assert {s.counts.item() for s in squares.values()} == {32}
    *_, squares = calibrate.measure(model, np.arange(32).reshape(2, 16))
    assert squares.keys() == wanted - {head}


def test_squares_of_the_first_layer_and_of_the_head():
    model = tiny()
    _, meta, tensors = arch.identify(*files.read(GOLDEN / "llama"), GOLDEN)
    ids = np.arange(20).reshape(2, 10)
    *_, squares = calibrate.measure(model, ids, output=True)
    w = {n: formats.dequantize(t).astype(np.float64) for n, t in tensors.items()}
    x = w["token_embd.weight"][ids.reshape(-1)]
    eps = meta["llama.attention.layer_norm_rms_epsilon"]
    h = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps) * w["blk.0.attn_norm.weight"]
    for kind in "qkv":
        found = squares[f"blk.0.attn_{kind}.weight"]
        np.testing.assert_allclose(found.sums[0], np.square(h).sum(axis=0), rtol=1e-4)
    hidden = [model.hidden(part.tolist(), model.new_cache(10)) for part in ids]
    found = next(s for n, s in squares.items() if not n.startswith("blk."))
    np.testing.assert_allclose(found.sums[0], np.square(hidden, dtype=np.float64).sum(axis=(0, 1)), rtol=1e-5)


def test_the_model_is_as_before():
    model = tiny()
    before = model(range(9), model.new_cache(9), "all")
    measuring = calibrate.measure(model, np.arange(32).reshape(4, 8))
    first = next(measuring)
    kept = {name: s.sums.copy() for name, s in first.items()}
    next(measuring)
    for name, s in first.items():  # what was given after a chunk does not change
        np.testing.assert_array_equal(s.sums, kept[name])
    measuring.close()
    np.testing.assert_array_equal(model(range(9), model.new_cache(9), "all"), before)


def test_inputs_that_are_no_numbers_are_an_error():
    model = tiny()
    model.network.layers[0].attn_norm[0] = np.nan
    with pytest.raises(EdgeqError, match=r"the inputs of blk\.0\.attn_q\.weight are not finite"):
        list(calibrate.measure(model, np.arange(16).reshape(1, 16)))


def test_limits():
    llm = SimpleNamespace(model=tiny(), tokenizer=None)
    with pytest.raises(ValueError, match="the limit of the model"):
        edgeq.imatrix(llm, "text", ctx=1 << 30)


# Files


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_written_and_read(tmp_path, suffix):
    made = some()
    write(tmp_path / f"a.{suffix}", made)
    found = read(tmp_path / f"a.{suffix}")
    same(found.importance, made.importance, rtol=1e-6)
    assert (found.datasets, found.chunks) == (["c4.txt"], 3)
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]


def test_the_gguf_file_is_that_of_llama_imatrix(tmp_path):
    """Written again, a file of llama.cpp's has all it had."""
    write(tmp_path / "again.gguf", read(LLAMA_CPP))
    a, b = gguf.GGUFReader(LLAMA_CPP), gguf.GGUFReader(tmp_path / "again.gguf")
    ours, theirs = (
        {k: (f.types, f.contents()) for k, f in r.fields.items() if k[:4] != "GGUF"} for r in (a, b)
    )
    assert ours == theirs
    ours, theirs = ([(t.name, t.shape.tolist(), t.data.tobytes()) for t in r.tensors] for r in (a, b))
    assert ours == theirs


def test_the_older_file_by_hand(tmp_path):
    squares = {"w": Squares(np.array([[12.0, 0, 6]]), np.array([[6.0]]))}
    write(tmp_path / "a.dat", Imatrix(squares, ["old", "ü"], 2, 4))
    # two calls of four tokens, not quite full; means 2, 0, 1
    wanted = struct.pack("<ii1sii3f", 1, 1, b"w", 2, 3, 4, 0, 2) + struct.pack("<ii2s", 2, 2, "ü".encode())
    assert (tmp_path / "a.dat").read_bytes() == wanted


def test_experts_without_text_are_as_important_as_any(tmp_path):
    squares = {"w": Squares(np.array([[4.0, 8], [0, 0]]), np.array([[4.0], [0]]))}
    for name in ("a.gguf", "a.dat"):
        write(tmp_path / name, Imatrix(squares, [], 1, 4))
        assert read(tmp_path / name).importance["w"].tolist() == [1, 2, 1, 1]
    write(
        tmp_path / "a.dat", Imatrix({**squares, "never": Squares(np.zeros((1, 2)), np.zeros((1, 1)))}, [], 1)
    )
    assert read(tmp_path / "a.dat").squares.keys() == {"w"}


def test_merged():
    a, b = some(0, chunks=3), some(1, chunks=5)
    both = merge([a, b])
    assert (both.chunks, both.datasets) == (8, ["c4.txt"])
    for name in a.squares:
        mean = (a.squares[name].sums + b.squares[name].sums) / (8 * 64)
        np.testing.assert_allclose(both.squares[name].mean, mean)
    other = Imatrix({"blk.1.attn_q.weight": Squares(np.ones((1, 9)), np.ones((1, 1)))}, [], 1)
    with pytest.raises(ValueError, match="these are of different models"):
        merge([a, other])


def test_odd_metadata_is_an_error(tmp_path):
    made = some()
    write(tmp_path / "a.gguf", Imatrix(made.squares, made.datasets, 3, 0))
    with pytest.raises(FormatError, match=r"imatrix\.chunk_size"):
        read(tmp_path / "a.gguf")


# The command line


@pytest.fixture
def folder(tmp_path):
    return complete("llama", tmp_path / "folder")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the 12 cats of 345 and the dog. " * 20)
    return tmp_path / "text.txt"


def run(*words):
    return CliRunner().invoke(cli.edgeq, ["imatrix", *map(str, words)], catch_exceptions=False)


def test_command(folder, text, tmp_path):
    words = ["-m", folder, "-f", text, "-c", 16, "--backend", "numpy"]
    done = run(*words, "-o", tmp_path / "all.gguf", "--chunks", 6)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'all.gguf'}\n")
    assert "6 chunks of 16 tokens" in done.stderr
    # the same in two parts, the second one added to the first, and in the older form
    run(*words, "-o", tmp_path / "a.gguf", "--chunks", 4)
    run(*words, "-o", tmp_path / "b.gguf", "--chunks", 2, "--chunk", 4, "--in-file", tmp_path / "a.gguf")
    run(*words, "-o", tmp_path / "c.dat", "--chunks", 2, "--chunk", 4)
    run("-o", tmp_path / "d.dat", "--in-file", tmp_path / "a.gguf", "--in-file", tmp_path / "c.dat", "-c", 16)
    whole, parts = read(tmp_path / "all.gguf"), read(tmp_path / "b.gguf")
    assert (whole.chunks, whole.datasets, whole.chunk_size) == (6, [str(text)], 16)
    assert (parts.chunks, parts.datasets, parts.chunk_size) == (6, [str(text)], 16)
    same(parts.importance, whole.importance, rtol=1e-5)
    assert read(tmp_path / "d.dat").chunks == 6
    # and a model can be quantized with it
    edgeq.quantize(folder, tmp_path / "q.gguf", "q4_0", imatrix=tmp_path / "all.gguf")


def test_usage(folder, text, tmp_path):
    words = ["-m", folder, "-o", tmp_path / "x.gguf", "--backend", "numpy"]
    assert run(*words).exit_code == 2
    assert run(*words, "-f", text, "-c", 16, "--chunk", 1000).exit_code == 2
    text.write_text("the 12 cats")
    with pytest.raises(EdgeqError, match="a chunk takes 512"):
        run(*words, "-f", text, "-c", 512)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_keeps_what_was_measured(folder, text, tmp_path, at):
    program = f"""
import signal, sys
from edgeq import arch, cli
hidden, calls = arch.Model.hidden, []
def interrupted(self, ids, cache):
    calls.append(1)
    if len(calls) == {at}:
        signal.raise_signal(signal.SIGINT)
    return hidden(self, ids, cache)
arch.Model.hidden = interrupted
sys.argv = ["edgeq", "imatrix", *sys.argv[1:]]
cli.main()
"""
    env = os.environ | {"PYTHONPATH": str(Path(edgeq.__file__).parents[1])}
    words = ["-m", folder, "-f", text, "-o", tmp_path / "out.gguf", "-c", 16, "--backend", "numpy"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    if at == 1:
        assert not (tmp_path / "out.gguf").exists()
        return
    assert f"go on with --in-file {tmp_path / 'out.gguf'} --chunk 2" in done.stderr
    assert imatrix.read(tmp_path / "out.gguf").chunks == 2
