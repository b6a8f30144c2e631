"""`quantize`: whole files. The encoders have tests of their own, and so have the types that a mix chooses."""

import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from folders import complete

import edgeq
from edgeq import EdgeqError, FormatError, arch, cli, files, formats
from edgeq.files import gguf_writer
from edgeq.files.imatrix import read as read_imatrix
from edgeq.files.output import Entry
from edgeq.quantizers import mix

LAYER = {"attn_norm": (256,), "ffn_norm": (256,)}
LAYER |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (256, 256))
LAYER |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
LAYERS = 2


def save(path, meta, tensors):
    """A file of float32 and float16 arrays."""
    made = []
    for name, w in tensors.items():
        data = w.view(np.uint8).reshape(-1)
        made.append(Entry(name, {4: 0, 2: 1}[w.itemsize], w.shape, w.nbytes, partial(iter, [data])))
    gguf_writer.write(path, meta, made)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A float16 llama of two layers whose rows are multiples of 256; its vocabulary is left out."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (96, 256), "output.weight": (96, 256), "output_norm.weight": (256,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LAYER.items()}
    tensors = {
        n: rng.normal(0, 0.05, s).astype(np.float32 if len(s) == 1 else np.float16) for n, s in shapes.items()
    }
    meta = {
        "general.architecture": "llama",
        "general.file_type": np.uint32(1),
        "test.kept": np.uint64(7),
        "llama.block_count": LAYERS,
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "quantize.imatrix.file": "of another file",
    }
    return save(tmp_path_factory.mktemp("model") / "model-f16.gguf", meta, tensors)


def types(path):
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


def contents(path, key):
    field = gguf.GGUFReader(path).fields[key]
    return field.types[0].name, field.contents()


@pytest.mark.parametrize("label", mix.MIXES)
def test_every_mix_is_written_and_read(model, tmp_path, label):
    [path] = edgeq.quantize(model, tmp_path / "out.gguf", label.upper())
    meta, tensors = files.read(model)
    assert types(path) == mix.plan(meta, tensors, label)
    assert contents(path, "general.file_type") == ("UINT32", mix.MIXES[label].file_type)
    assert contents(path, "general.quantization_version") == ("UINT32", 2)
    assert contents(path, "test.kept") == ("UINT64", 7)
    assert "quantize.imatrix.file" not in gguf.GGUFReader(path).fields
    after, errors = files.read(path)[1], []
    for name, tensor in tensors.items():
        w = formats.dequantize(tensor)
        errors.append(np.square(formats.dequantize(after[name]) - w).mean() / np.square(w).mean())
    assert max(errors) < {"tq1_0": 0.7, "tq2_0": 0.7, "q2_k": 0.1, "q3_k_s": 0.04}.get(label, 0.03)


def test_bytes_are_those_of_gguf_py(model, tmp_path):
    [path] = edgeq.quantize(model, tmp_path / "out.gguf", "q8_0")
    before = {t.name: t.data for t in gguf.GGUFReader(model).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            theirs = gguf.quantize(before[tensor.name].astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            assert tensor.data.tobytes() == theirs.tobytes()


def test_what_stands_in_for_a_searched_type_is_searched(tmp_path):
    """q4_0 in a file that is called q2_k; in one that is called q4_0 it is llama.cpp's."""
    name, w = "blk.0.ffn_up.weight", np.random.default_rng(0).normal(0, 0.05, (32, 288)).astype(np.float16)
    path = save(tmp_path / "model.gguf", {"general.architecture": "llama", "llama.block_count": 1}, {name: w})
    made = {}
    for label in ("q2_k", "q4_0"):
        [file] = edgeq.quantize(path, tmp_path / f"{label}.gguf", label)
        made[label] = files.read(file)[1][name]
        assert made[label].format == "q4_0"
    np.testing.assert_array_equal(made["q4_0"].data, formats.quantize("q4_0", w).data)
    searched, rounded = (np.square(formats.dequantize(t) - w).sum() for t in made.values())
    assert searched < 0.97 * rounded


def test_the_bytes_do_not_depend_on_threads_and_panels(model, tmp_path, monkeypatch):
    from edgeq.convert import stream

    [one] = edgeq.quantize(model, tmp_path / "one.gguf", "q4_k_m", threads=1)
    monkeypatch.setattr(stream, "PANEL", 2000)
    [many] = edgeq.quantize(model, tmp_path / "many.gguf", "q4_k_m", threads=5)
    assert one.read_bytes() == many.read_bytes()


def test_a_folder_is_quantized_as_its_file_is(tmp_path):
    source = complete("llama", tmp_path / "folder")
    edgeq.quantize(source, tmp_path / "f32.gguf", "f32")
    edgeq.quantize(source, tmp_path / "a.gguf", "q5_0")
    edgeq.quantize(tmp_path / "f32.gguf", tmp_path / "b.gguf", "q5_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    ids = list(range(20))
    whole, small = (arch.load(*files.read(tmp_path / n), backend="numpy") for n in ("f32.gguf", "a.gguf"))
    a, b = (m(ids, m.new_cache(20), "all") for m in (whole, small))
    assert np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] > 0.98


def test_options(model, tmp_path):
    [path] = edgeq.quantize(
        model,
        tmp_path / "out.gguf",
        "q4_k_s",
        output_tensor_type="q5_1",
        token_embedding_type="q8_0",
        tensor_types={r"blk\.1\..*_down": "q6_k"},
    )
    found = types(path)
    assert [found[f"{n}.weight"] for n in ("output", "token_embd", "blk.1.ffn_down")] == [
        "q5_1",
        "q8_0",
        "q6_k",
    ]
    assert found["blk.0.attn_q.weight"] == "q4_k"
    [path] = edgeq.quantize(model, tmp_path / "out.gguf", "q4_k", pure=True, leave_output_tensor=True)
    assert set(types(path).values()) == {"q4_k", "f16", "f32"}
    assert types(path)["output.weight"] == "f16"


def test_a_quantized_source_is_refused_unless_allowed(model, tmp_path):
    [path] = edgeq.quantize(model, tmp_path / "q8_0.gguf", "q8_0")
    with pytest.raises(EdgeqError, match="is q8_0 already.*--allow-requantize"):
        edgeq.quantize(path, tmp_path / "q4_0.gguf", "q4_0")
    edgeq.quantize(path, tmp_path / "q4_0.gguf", "q4_0", allow_requantize=True)
    [copy] = edgeq.quantize(path, tmp_path / "copy.gguf", "copy")
    assert copy.read_bytes() == path.read_bytes()
    again = edgeq.quantize(path, tmp_path / "again.gguf", "q8_0")  # nothing would be lost
    assert again[0].read_bytes() == path.read_bytes()


def test_requests_that_cannot_be_met(model, tmp_path):
    with pytest.raises(ValueError, match="unknown type 'q9_9'; edgeq has f32, f16"):
        edgeq.quantize(model, tmp_path / "x.gguf", "q9_9")
    with pytest.raises(ValueError, match="unknown format 'q9'"):
        edgeq.quantize(model, tmp_path / "x.gguf", "q4_0", tensor_types={"attn": "q9"})
    with pytest.raises(EdgeqError, match="is the model that is read"):
        edgeq.quantize(model, model, "q4_0")
    with pytest.raises(EdgeqError, match="nowhere is no folder"):
        edgeq.quantize(model, tmp_path / "nowhere" / "x.gguf", "q4_0")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_k"])
def test_weights_that_are_no_numbers_are_named(tmp_path, type):
    w = np.zeros((600, 512), np.float32)
    w[520, 3] = np.nan
    path = save(tmp_path / "bad.gguf", {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": w})
    with pytest.raises(FormatError, match="tensor blk.0.ffn_up.weight, rows 512 to 599: found .*nan"):
        edgeq.quantize(path, tmp_path / "out.gguf", type)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


# ---- importance matrices


def legacy(path, entries, chunks=10, dataset="c4.txt"):
    """llama.cpp's older file: means times calls."""
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, values.size)
        data += (values * 4).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", chunks, len(dataset)) + dataset.encode())
    return path


def modern(path, entries, chunks=10):
    """llama.cpp's GGUF file, by gguf-py: sums and counts."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["c4.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in entries.items():
        counts = np.full((len(values), 1), 8, np.float32)
        writer.add_tensor(f"{name}.in_sum2", values * 8)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def measured():
    rng = np.random.default_rng(1)
    return {
        f"blk.{i}.{name}.weight": rng.exponential(1, (1, shape[1])).astype(np.float32)
        for i in range(LAYERS)
        for name, shape in LAYER.items()
        if len(shape) == 2
    }


@pytest.mark.parametrize("kind", [legacy, modern])
def test_importance_matrices(model, tmp_path, measured, kind):
    path = kind(tmp_path / "imatrix", measured)
    read = read_imatrix(path)
    assert read.importance.keys() == measured.keys()
    for name, values in measured.items():
        np.testing.assert_allclose(read.importance[name], values[0], rtol=1e-6)
    assert (read.datasets[0], read.chunks) == ("c4.txt", 10)

    [plain] = edgeq.quantize(model, tmp_path / "plain.gguf", "q3_k_s")
    [weighted] = edgeq.quantize(model, tmp_path / "weighted.gguf", "q3_k_s", imatrix=path)
    assert contents(weighted, "quantize.imatrix.file") == ("STRING", str(path))
    assert contents(weighted, "quantize.imatrix.dataset") == ("STRING", "c4.txt")
    assert contents(weighted, "quantize.imatrix.entries_count") == ("UINT32", len(measured))
    assert contents(weighted, "quantize.imatrix.chunks_count") == ("UINT32", 10)

    def error(file, name):
        whole, coded = (formats.dequantize(files.read(p)[1][name]) for p in (model, file))
        return (measured[name] * np.square(whole - coded)).sum()

    for name in measured:
        assert error(weighted, name) < error(plain, name), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a length of 4 bytes"),
        (struct.pack("<i", 0), "no entries"),
        (struct.pack("<ii", 1, 1 << 30), "a length of 1,073,741,824 bytes, expected at most the 0"),
        (struct.pack("<ii", 1, -1), "a length of -1 bytes"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 1 << 20), "a length of 4,194,304 bytes"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("nan")), "entry a: found others, expected finite"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, -1.0), "entry a: found others, expected finite"),
        (struct.pack("<ii1siif", 1, 1, b"a", -1, 1, 1.0), "entry a: found -1 calls"),
    ],
)
def test_unsound_importance_matrices(tmp_path, data, message):
    (tmp_path / "imatrix.dat").write_bytes(data or b"abc")
    with pytest.raises(FormatError, match=message):
        read_imatrix(tmp_path / "imatrix.dat")


def test_importance_of_another_model(model, tmp_path, measured):
    path = modern(tmp_path / "a.gguf", measured | {"blk.0.attn_q.weight": np.ones((1, 32), np.float32)})
    with pytest.raises(FormatError, match="entry blk.0.attn_q.weight: found 32 values, expected 256"):
        edgeq.quantize(model, tmp_path / "x.gguf", "q4_0", imatrix=path)
    path = modern(tmp_path / "b.gguf", {"token_embd.weight": np.ones((1, 32), np.float32)})
    edgeq.quantize(model, tmp_path / "x.gguf", "q4_0", imatrix=path)  # which llama.cpp ignores, too
    lonely = {"a.weight.in_sum2": np.ones((1, 32), np.float32)}
    with pytest.raises(FormatError, match="found no such pair"):
        read_imatrix(save(tmp_path / "c.gguf", {"general.type": "imatrix"}, lonely))


# ---- the command line


def run(*words):
    return CliRunner().invoke(cli.edgeq, list(map(str, words)), catch_exceptions=False)


def test_quantize_command(model, tmp_path):
    done = run("quantize", model, tmp_path / "out.gguf", "Q4_K_M", "--tensor-type", "attn_k=Q8_0", "-t", 1)
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path / 'out.gguf'}\n"
    assert "q4_k" in done.stderr
    assert types(tmp_path / "out.gguf")["blk.0.attn_k.weight"] == "q8_0"
    done = run("quantize", model, tmp_path / "parts.gguf", "q8_0", "--split-max-size", "300K")
    assert done.stdout.splitlines()[0].endswith("parts-00001-of-00006.gguf")


def test_dry_run_writes_nothing(model, tmp_path):
    done = run("quantize", "--dry-run", model, "Q4_K_M")
    assert done.exit_code == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("blk.0.attn_q.weight"))
    assert row.split() == ["blk.0.attn_q.weight", "256", "x", "256", "f16", "q4_k", "36,864"]
    size = sum(t.n_bytes for t in gguf.GGUFReader(model).tensors)
    assert done.stdout.splitlines()[-1].startswith(f"{size / 2**20:.1f} MiB (16.02 bits per weight) to ")
    assert not any(tmp_path.iterdir())


def test_usage(model, tmp_path):
    for words in (
        ["quantize", model],
        ["quantize", model, "q8_0"],
        ["quantize", model, tmp_path / "x.gguf", "q9_9"],
        ["quantize", model, tmp_path / "x.gguf", "q4_0", "--tensor-type", "attn"],
        ["quantize", model, tmp_path / "x.gguf", "q4_0", "--output-tensor-type", "q9"],
        ["quantize", model, tmp_path / "x.gguf", "q4_0", "--split-max-size", "2X"],
        ["convert", model, tmp_path / "folder", "--outtype", "q8_0"],
    ):
        assert run(*words).exit_code == 2, words


def test_help_names_all_types():
    text = run("quantize", "--help").stdout.replace("\n", " ")
    named = text.partition("one of:")[2].partition(".")[0]
    assert [name.strip() for name in named.split(",")] == [*mix.MIXES, "copy"]


def test_convert_command(tmp_path):
    source = complete("llama", tmp_path / "folder")
    assert run("convert", source, tmp_path / "model.gguf").stdout == f"{tmp_path / 'model.gguf'}\n"
    assert set(types(tmp_path / "model.gguf").values()) == {"f32"}
    run("convert", source, tmp_path / "small.gguf", "--outtype", "q8_0")
    assert set(types(tmp_path / "small.gguf").values()) == {"q8_0", "f32"}
    assert run("convert", tmp_path / "small.gguf", tmp_path / "back").exit_code == 0
    assert {t.format for t in files.read(tmp_path / "back")[1].values()} == {"f16", "f32"}
    run("convert", tmp_path / "small.gguf", tmp_path / "large.gguf", "--outtype", "f16")
    assert set(types(tmp_path / "large.gguf").values()) == {"f16", "f32"}


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, number):
    """A process that is in the middle of it gets a signal."""
    program = """
import signal, sys
from edgeq import cli
from edgeq.convert import stream
recode, calls = stream._recode, []
def slow(*args):
    calls.append(1)
    if len(calls) == 3:
        signal.raise_signal(signal.NUMBER)
    return recode(*args)
stream._recode = slow
sys.argv = ["edgeq", "quantize", sys.argv[1], sys.argv[2], "q8_0", "-t", "1"]
cli.main()
"""
    w = np.zeros((1024, 1024), np.float32)
    source = save(tmp_path / "f32.gguf", {"general.architecture": "llama"}, {"blk.0.ffn_up.weight": w})
    program = program.replace("NUMBER", number)
    env = os.environ | {"PYTHONPATH": str(Path(edgeq.__file__).parents[1])}
    words = [sys.executable, "-c", program, str(source), str(tmp_path / "out.gguf")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == {"SIGTERM": 143, "SIGINT": 130}[number], done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["f32.gguf"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of 512 MB, most of it a hole in the file."""
    path, count = tmp_path / "large.gguf", 4
    shape, step = (8192, 4096), 8192 * 4096 * 4
    writer = gguf.GGUFWriter(path, "llama")
    for i in range(count):
        dtype, kind = np.dtype("f4"), gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(f"blk.{i}.ffn_up.weight", shape, dtype, step, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + count * step + 32)
    program = """
import sys
from edgeq import quantizers
quantizers.quantize(sys.argv[1], sys.argv[2], "q8_0", threads=2)
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""
    env = os.environ | {"PYTHONPATH": str(Path(edgeq.__file__).parents[1])}
    words = [sys.executable, "-c", program, str(path), str(tmp_path / "out.gguf")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400_000
