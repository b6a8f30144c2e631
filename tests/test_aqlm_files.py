"""Folders in AQLM: read as the published layout has them, written, run; what is wrong with one is named."""

import json

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from folders import complete
from safetensors import safe_open

import edgeq
from edgeq import EdgeqError, FormatError, arch, cli, files, formats, quantizers
from edgeq.convert.huggingface import to_huggingface
from edgeq.evaluate.audit import audit
from edgeq.evaluate.difference import difference
from edgeq.quantizers.layerwise import Calibration

SCHEMES = [(1, 16, 8), (2, 8, 8), (8, 8, 32), (1, 12, 8), (3, 5, 4)]
ARCHITECTURES = ["llama", "gemma3", "qwen2", "qwen3"]
TEXT = "the 12 cats of 345 and the dog's tail. Then they went home, all of them! " * 40
QUICK = Calibration(TEXT, chunks=6, ctx=32, backend="numpy")
OPTIONS = {"bits": 5, "rounds": 2, "beam": 4}


def quantization(scheme, **change):
    count, bits, group = scheme
    own = {"in_group_size": group, "num_codebooks": count, "nbits_per_codebook": bits, "out_group_size": 1}
    return {"quant_method": "aqlm", "linear_weights_not_to_quantize": ["lm_head.weight"]} | own | change


def layer(scheme, rng, rows=40, groups=3):
    """Tensors of a layer, made as the AQLM library makes them, and the weights in float64."""
    count, bits, group = scheme
    codes = rng.integers(0, 1 << bits, (rows, groups, count))
    codebooks = rng.standard_normal((count, 1 << bits, 1, group)).astype(np.float16)
    scales = rng.random((rows, 1, 1, 1)).astype(np.float16)
    w = sum(codebooks[m, codes[:, :, m], 0].astype(np.float64) for m in range(count)) * scales[:, :, 0]
    signed = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    stored = signed.astype(np.int8 if bits <= 8 else np.int16)
    return {"a.codes": stored, "a.codebooks": codebooks, "a.scales": scales}, w.reshape(rows, -1)


def save(folder, tensors, quantized):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_reading(tmp_path, scheme):
    tensors, w = layer(scheme, np.random.default_rng(0))
    tensors["norm.weight"] = np.ones(8, np.float32)
    read = files.read(save(tmp_path, tensors, quantization(scheme)))[1]
    assert {name: (t.format, t.shape) for name, t in read.items()} == {
        "a.weight": ("aqlm", w.shape),
        "norm.weight": ("f32", (8,)),
    }
    np.testing.assert_allclose(formats.dequantize(read["a.weight"]), w, rtol=1e-6, atol=1e-6)
    assert formats.get("aqlm").scheme(read["a.weight"]) == scheme


def test_by_hand(tmp_path):
    """Two codebooks of which row 0 is ones and eights, and row 255, code -1, tens: 0.5 * (8 + 10) = 9."""
    codebooks = np.zeros((2, 256, 1, 8), np.float16)
    codebooks[0, 0], codebooks[1, 0], codebooks[0, 255], codebooks[1, 255] = 1, 8, 10, 10
    codes = np.array([[[0, 0], [-1, 0]], [[0, -1], [127, -128]]], np.int8)
    scales = np.array([0.5, 2], np.float32).reshape(2, 1, 1, 1)
    tensors = {"a.codes": codes, "a.codebooks": codebooks, "a.scales": scales}
    read = files.read(save(tmp_path, tensors, quantization((2, 8, 8))))[1]["a.weight"]
    expected = np.repeat([[4.5, 9], [22, 0]], 8, axis=1)
    np.testing.assert_array_equal(formats.dequantize(read), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantizing_writes_folders_that_run(tmp_path, name):
    # GGUF files cannot state another scale than that of the heads' width
    config = {"query_pre_attn_scalar": 16} if name == "gemma3" else {}
    source = complete(name, tmp_path / name, **config)
    made = tmp_path / "made"
    [path] = edgeq.quantize(source, made, "copy", method="aqlm", method_options=OPTIONS, calibration=QUICK)
    assert path == made
    (meta, read), plain = files.read(made), files.read(source)[1]
    assert read.keys() == plain.keys()
    quantized = meta["config"]["quantization_config"]
    assert (quantized["num_codebooks"], quantized["nbits_per_codebook"]) == (2, 5)
    for key, tensor in read.items():
        matrix = key.endswith("proj.weight")
        assert tensor.format == "aqlm" if matrix else tensor.format in ("f32", "f16", "bf16"), key
        if key.endswith(".weight"):
            assert (key in quantized["linear_weights_not_to_quantize"]) != matrix, key
        w, coded = formats.dequantize(plain[key]), formats.dequantize(tensor)
        if matrix:  # 1.25 bits, of random weights
            assert np.linalg.norm(w - coded) < 0.8 * np.linalg.norm(w), key
        else:
            np.testing.assert_array_equal(w, coded)
    ids = list(range(20))
    logits = []
    for backend in ("numpy", "numba"):
        with edgeq.load(made, backend=backend) as llm:
            logits.append(llm.logits(ids))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-2 * np.abs(logits[0]).max())


def test_stored_as_the_library_does(tmp_path):
    source = complete("llama", tmp_path / "llama")
    edgeq.quantize(
        source, tmp_path / "made", "copy", method="aqlm", method_options=OPTIONS, calibration=QUICK
    )
    base = "model.layers.1.mlp.down_proj"
    with safe_open(tmp_path / "made" / "model.safetensors", "np") as held:
        codes, books, scales = (
            held.get_tensor(f"{base}.{role}") for role in ("codes", "codebooks", "scales")
        )
    assert (codes.dtype, codes.shape) == (np.int8, (64, 12, 2))
    assert (books.dtype, books.shape) == (np.float16, (2, 32, 1, 8))
    assert (scales.dtype, scales.shape) == (np.float16, (64, 1, 1, 1))
    unsigned = codes.astype(int) & 31
    w = sum(books[m, unsigned[:, :, m], 0].astype(np.float32) for m in range(2)).reshape(64, -1)
    w = w * scales.reshape(-1, 1).astype(np.float32)
    read = files.read(tmp_path / "made")[1][f"{base}.weight"]
    np.testing.assert_allclose(formats.dequantize(read), w, rtol=1e-6)


def test_such_a_folder_is_written_again(tmp_path):
    source = complete("llama", tmp_path / "llama")
    made = tmp_path / "made"
    edgeq.quantize(source, made, "copy", method="aqlm", method_options=OPTIONS, calibration=QUICK)
    again = to_huggingface(made, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (made / name).read_bytes() == (again / name).read_bytes()
    plain = to_huggingface(made, tmp_path / "plain", "f32")
    ids = list(range(20))
    a, b = (arch.load(*files.read(p), backend="numpy") for p in (made, plain))
    np.testing.assert_allclose(a(ids, a.new_cache(20)), b(ids, b.new_cache(20)), atol=1e-5)
    with pytest.raises(EdgeqError, match="is aqlm already, and would lose a second time as q8_0"):
        quantizers.quantize(made, tmp_path / "x.gguf", "q8_0")
    quantizers.quantize(made, tmp_path / "x.gguf", "f32", allow_requantize=True)
    file = arch.load(*files.read(tmp_path / "x.gguf"), backend="numpy")
    np.testing.assert_allclose(file(ids, file.new_cache(20)), a(ids, a.new_cache(20)), atol=1e-4)


def test_verdicts_on_such_a_folder(tmp_path):
    source = complete("llama", tmp_path / "llama")
    made = []
    for seed in (0, 1):
        made.append(tmp_path / f"made{seed}")
        edgeq.quantize(
            source,
            made[-1],
            "copy",
            method="aqlm",
            method_options=OPTIONS | {"seed": seed},
            calibration=QUICK,
        )
    found = audit(made[0], source)
    assert found.sound, [*found.problems, *found.far]
    assert not difference(made[0], made[0])
    matrices = [name for name, t in files.read(made[0])[1].items() if t.format == "aqlm"]
    assert len(difference(*made).tensors) == len(matrices)


def test_command(tmp_path):
    source = complete("llama", tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*words):
        options = ["--calibration", tmp_path / "text.txt", "--chunks", 6, "-c", 32, "--option", "bits=4"]
        options += ["--option", "rounds=1"]
        words = ["quantize", source, *words, "--method", "aqlm", *options]
        return CliRunner().invoke(cli.edgeq, list(map(str, words)), catch_exceptions=False)

    done = run(tmp_path / "out")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "aqlm" in done.stderr
    assert {t.format for t in files.read(tmp_path / "out")[1].values()} == {"aqlm", "f32"}
    with pytest.raises(EdgeqError, match="would be q8_0: beside aqlm, .* other weights stay as they are"):
        run(tmp_path / "other", "q8_0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks: found 0, expected a whole number from 1 to 32"),
        ({"num_codebooks": True}, "num_codebooks: found True"),
        ({"nbits_per_codebook": 17}, "nbits_per_codebook: found 17, expected a whole number from 1 to 16"),
        ({"nbits_per_codebook": None}, "nbits_per_codebook: found None"),
        ({"in_group_size": "8"}, "in_group_size: found '8'"),
        ({"in_group_size": 1 << 40}, "in_group_size: found"),
        ({"out_group_size": 2}, "out_group_size: found 2, expected 1"),
    ],
)
def test_configs_of_other_kinds_are_refused(tmp_path, change, message):
    tensors, _ = layer((2, 8, 8), np.random.default_rng(0))
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization((2, 8, 8), **change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.codes": np.zeros((40, 3, 3), np.int8)}, r"a.codes: found shape \(40, 3, 3\) in bytes"),
        ({"a.codes": np.zeros((40, 3, 2), np.int16)}, r"a.codes: found shape \(40, 3, 4\) in bytes"),
        ({"a.codes": np.zeros((40, 6), np.int8)}, "a.codes: found shape"),
        ({"a.codes": np.zeros((40, 0, 2), np.int8)}, "a.codes: found shape .* expected some rows and groups"),
        ({"a.codes": np.zeros((40, 3, 2), np.float32)}, "a.codes: found f32"),
        ({"a.codebooks": None}, "a.codebooks: found none"),
        ({"a.codebooks": np.zeros((2, 255, 1, 8), np.float16)}, "a.codebooks: found f16 of shape"),
        ({"a.codebooks": np.zeros((2, 256, 1, 8), np.int8)}, "a.codebooks: found i8 of shape"),
        ({"a.scales": None}, "a.scales: found none"),
        ({"a.scales": np.zeros((39, 1, 1, 1), np.float16)}, "a.scales: found f16 of shape"),
        ({"a.scales": np.zeros(40, np.float16)}, "a.scales: found f16 of shape"),
        ({"b.weight": np.zeros(4, np.int16)}, "b.weight: found integers"),
        ({"a.weight": np.zeros((40, 24), np.float16)}, "a.weight: found it beside codes"),
    ],
)
def test_unsound_tensors_are_named(tmp_path, change, message):
    tensors, _ = layer((2, 8, 8), np.random.default_rng(0))
    tensors = {k: v for k, v in (tensors | change).items() if v is not None}
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization((2, 8, 8))))
