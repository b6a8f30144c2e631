"""Folders in compressed-tensors: words are packed here once more, bit by bit."""

import json

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from folders import complete
from safetensors import safe_open

from edgeq import EdgeqError, FormatError, arch, cli, files, formats, quantizers
from edgeq.convert.huggingface import to_huggingface
from edgeq.inputs import Inputs

SCHEMES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def words(q, bits):
    """Signed codes (rows, n) as words of 32 bits, by Python's integers: int32 (rows, ceil(n * bits / 32))."""
    made = []
    for row in q:
        whole = sum((int(code) + (1 << bits - 1)) << bits * i for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        made.append([whole >> 32 * i & 0xFFFFFFFF for i in range(count)])
    return np.array(made, np.uint32).view(np.int32)


def quantization(bits, symmetric, strategy="group", **own):
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": 32,
    }
    layout = "int-quantized" if bits == 8 else "pack-quantized"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | own}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def save(folder, tensors, quantized):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def layer(bits, symmetric, rng, groups=3):
    """Tensors of one layer of 40 x 96 weights, and the weights."""
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = rng.integers(low, high, (40, 96))
    scale = rng.uniform(0.01, 1, (40, groups)).astype(np.float16)
    zero = np.zeros((40, groups), int) if symmetric else rng.integers(low, high, (40, groups))
    of_column = np.repeat(np.arange(groups), 96 // groups)
    w = scale.astype(np.float32)[:, of_column] * (q - zero[:, of_column])
    tensors = {"a.weight_scale": scale}
    if bits == 8:
        tensors["a.weight"] = q.astype(np.int8)
    else:
        tensors |= {"a.weight_packed": words(q, bits), "a.weight_shape": np.array([40, 96])}
    if not symmetric:
        packed = zero.astype(np.int8) if bits == 8 else np.ascontiguousarray(words(zero.T, bits).T)
        tensors["a.weight_zero_point"] = packed
    return tensors, w


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
def test_reading(tmp_path, bits, symmetric):
    rng = np.random.default_rng(bits)
    tensors, w = layer(bits, symmetric, rng)
    tensors["norm.weight"] = np.ones(96, np.float32)
    read = files.read(save(tmp_path, tensors, quantization(bits, symmetric)))[1]
    assert {name: (t.format, t.shape) for name, t in read.items()} == {
        "a.weight": (f"i{bits}", (40, 96)),
        "norm.weight": ("f32", (96,)),
    }
    np.testing.assert_allclose(formats.dequantize(read["a.weight"]), w, rtol=1e-6, atol=1e-6)


def test_scales_of_rows_and_of_matrices(tmp_path):
    rng = np.random.default_rng(0)
    tensors, w = layer(8, True, rng, groups=1)
    read = files.read(save(tmp_path, tensors, quantization(8, True, "channel")))[1]
    np.testing.assert_allclose(formats.dequantize(read["a.weight"]), w, rtol=1e-6)
    tensors["a.weight_scale"] = np.array([0.5], np.float32)
    read = files.read(save(tmp_path, tensors, quantization(8, True, "tensor")))[1]
    assert np.array_equal(formats.dequantize(read["a.weight"]), tensors["a.weight"] * np.float32(0.5))


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
def test_writing(tmp_path, bits, symmetric):
    source = complete("llama", tmp_path / "folder")
    made = to_huggingface(source, tmp_path / "made", f"int{bits}", group=32, symmetric=symmetric)
    (meta, read), plain = files.read(made), files.read(source)[1]
    assert read.keys() == plain.keys()
    for name, tensor in read.items():
        w, coded = formats.dequantize(plain[name]), formats.dequantize(tensor)
        if "proj" not in name:
            assert np.array_equal(w, coded), name
            continue
        assert tensor.format == f"i{bits}"
        reach = np.abs(w).reshape(-1, 32).max(axis=1)
        error = np.abs(w - coded).reshape(-1, 32).max(axis=1)
        assert (error <= reach / (2**bits - 1) * 1.6 + 1e-6).all(), name

    name = "model.layers.1.mlp.down_proj"
    with safe_open(made / "model.safetensors", "np") as held:  # by hand
        scale = held.get_tensor(f"{name}.weight_scale")
        assert scale.shape == (64, 3)
        tensor = read[f"{name}.weight"]
        zero = tensor.parts.get("zero", np.full(scale.shape, 1 << bits - 1)).astype(int) - (1 << bits - 1)
        q = np.rint(formats.dequantize(tensor).reshape(64, 3, 32) / scale[:, :, None] + zero[:, :, None])
        q = q.reshape(64, 96).astype(int)
        if bits == 8:
            assert np.array_equal(held.get_tensor(f"{name}.weight"), q)
        else:
            assert held.get_tensor(f"{name}.weight_shape").tolist() == [64, 96]
            assert np.array_equal(held.get_tensor(f"{name}.weight_packed"), words(q, bits))
        if not symmetric:
            stored = held.get_tensor(f"{name}.weight_zero_point")
            assert np.array_equal(stored, zero if bits == 8 else words(zero.T, bits).T)
    weights = meta["config"]["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights == quantization(bits, symmetric)["config_groups"]["group_0"]["weights"]


def activations(strategy, **own):
    """A scheme for inputs."""
    made = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": True}
    return {"input_activations": made | own}


def save_with_inputs(folder, scheme, **more):
    tensors, _ = layer(8, True, np.random.default_rng(0), groups=1)
    quantized = quantization(8, True, "channel")
    quantized["config_groups"]["group_0"] |= scheme
    return save(folder, tensors | more, quantized)


@pytest.mark.parametrize(
    ("scheme", "more", "inputs"),
    [
        (activations("token"), {}, Inputs("token")),
        (activations("group", group_size=32), {}, Inputs("block")),
        (activations(None), {}, Inputs("token")),
        (
            activations("tensor", dynamic=False),
            {"a.input_scale": np.array([0.25], np.float16)},
            Inputs("tensor", 0.25, 0),
        ),
        (
            activations("tensor", dynamic=False, symmetric=False),
            {"a.input_scale": np.array(0.5, np.float32), "a.input_zero_point": np.array([-7], np.int8)},
            Inputs("tensor", 0.5, -7),
        ),
        ({"input_activations": None, "output_activations": None}, {}, None),
    ],
)
def test_reading_of_inputs(tmp_path, scheme, more, inputs):
    read = files.read(save_with_inputs(tmp_path, scheme, **more))[1]
    assert read.keys() == {"a.weight"}
    assert read["a.weight"].inputs == inputs


@pytest.mark.parametrize(
    "scheme",
    [
        activations("tensor"),
        activations("channel"),
        activations("group", group_size=128),
        activations("token", dynamic=False),
        activations("token", symmetric=False),
        activations("token", num_bits=4),
        activations("token", type="float"),
        activations("tensor", dynamic="local"),
        {"input_activations": 8},
        {"output_activations": {"num_bits": 8}},
    ],
)
def test_inputs_of_other_kinds_are_refused(tmp_path, scheme):
    with pytest.raises(FormatError, match=next(iter(scheme))):
        files.read(save_with_inputs(tmp_path, scheme))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "a.input_scale: found none"),
        ({"a.input_scale": np.ones(3, np.float32)}, "a.input_scale: found shape"),
        ({"a.input_scale": np.ones(1, np.int8)}, "a.input_scale: found integers"),
        ({"a.input_scale": np.zeros(1, np.float32)}, "a.input_scale: found 0, expected a finite positive"),
        ({"a.input_scale": np.full(1, np.nan, np.float32)}, "a.input_scale: found nan"),
        ({"a.input_scale": np.ones(1, np.float32)}, "a.input_zero_point: found none"),
        (
            {"a.input_scale": np.ones(1, np.float32), "a.input_zero_point": np.ones(2, np.int8)},
            "a.input_zero_point: found shape",
        ),
    ],
)
def test_unsound_scales_of_inputs_are_named(tmp_path, more, message):
    scheme = activations("tensor", dynamic=False, symmetric=False)
    with pytest.raises(FormatError, match=message):
        files.read(save_with_inputs(tmp_path, scheme, **more))


def test_such_a_folder_runs_and_becomes_a_file(tmp_path):
    source = complete("llama", tmp_path / "folder")
    made = to_huggingface(source, tmp_path / "made", "int8")
    ids = list(range(20))
    whole, small = (arch.load(*files.read(p), backend="numpy") for p in (source, made))
    a, b = (m(ids, m.new_cache(20), "all") for m in (whole, small))
    assert np.abs(a - b).max() < 0.3
    with pytest.raises(EdgeqError, match="GGUF files have no type for i8"):
        quantizers.quantize(made, tmp_path / "x.gguf", "copy")
    with pytest.raises(EdgeqError, match="is i8 already"):
        quantizers.quantize(made, tmp_path / "x.gguf", "q8_0")
    quantizers.quantize(made, tmp_path / "x.gguf", "f32", allow_requantize=True)
    file = arch.load(*files.read(tmp_path / "x.gguf"), backend="numpy")
    np.testing.assert_allclose(file(ids, file.new_cache(20), "all"), b, atol=1e-4)


def test_groups_divide_the_columns(tmp_path):
    source = complete("llama", tmp_path / "folder")
    with pytest.raises(EdgeqError, match="96 columns are no whole groups of 64"):
        to_huggingface(source, tmp_path / "made", "int4")
    with pytest.raises(ValueError, match="groups of 40 columns, expected a multiple of 32"):
        to_huggingface(source, tmp_path / "made", "int4", group=40)
    words = ["convert", str(source), str(tmp_path / "made"), "--outtype", "int4", "--group-size", "32"]
    assert CliRunner().invoke(cli.edgeq, [*words, "--asymmetric"], catch_exceptions=False).exit_code == 0
    assert files.read(tmp_path / "made")[1]["model.layers.0.mlp.up_proj.weight"].parts.keys() == {
        "scale",
        "zero",
    }
    assert CliRunner().invoke(cli.edgeq, [*words[:3], "--group-size", "32"]).exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format: found 'nvfp4-pack-quantized'"),
        ({"format": "int-quantized"}, "format: found 'int-quantized', expected int-quantized with 8 bits"),
        ({"config_groups": {}}, "config_groups: found {}"),
        ({"config_groups": {"a": {}, "b": {}}}, "config_groups"),
        ({"config_groups": {"a": {"weights": None}}}, "weights: found None"),
        ({"config_groups": {"a": 5}}, "weights: found None"),
    ],
)
def test_configs_of_other_kinds_are_refused(tmp_path, change, message):
    tensors, _ = layer(4, True, np.random.default_rng(0))
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization(4, True) | change))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_bits": 5}, "int of 2, 3, 4 or 8 bits"),
        ({"type": "float"}, "int of 2, 3, 4 or 8 bits"),
        ({"symmetric": "yes"}, "symmetric: found 'yes'"),
        ({"strategy": "block"}, "strategy: found 'block'"),
        ({"actorder": "group"}, "actorder: found 'group'"),
    ],
)
def test_schemes_of_other_kinds_are_refused(tmp_path, own, message):
    tensors, _ = layer(4, True, np.random.default_rng(0))
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization(**{"bits": 4, "symmetric": True} | own)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_scale": None}, "weight_scale: found none"),
        ({"a.weight_scale": np.ones((40, 3), np.int8)}, "weight_scale: found integers"),
        ({"a.weight_scale": np.ones((40, 5), np.float32)}, "weight_scale: found shape"),
        ({"a.weight_scale": np.ones((39, 3), np.float32)}, "weight_scale: found shape"),
        ({"a.weight_scale": np.ones((40, 0), np.float32)}, "weight_scale: found shape"),
        ({"a.weight_shape": np.array([40, 95])}, "weight_shape: found another shape"),
        ({"a.weight_zero_point": None}, "weight_zero_point: found none"),
        ({"a.weight_zero_point": np.zeros((4, 3), np.int32)}, "weight_zero_point: found shape"),
        ({"a.weight_zero_point": np.zeros((5, 3), np.float32)}, "weight_zero_point: found floating"),
        ({"a.weight_packed": np.zeros(12, np.int32)}, "weight_packed: found shape"),
        ({"b.weight_packed": np.zeros((2, 1), np.int32)}, "b.weight_scale: found none"),
        ({"a.weight_g_idx": np.zeros(96, np.int32)}, "a.weight_g_idx: found integers"),
        ({"c.weight": np.zeros((2, 2), np.int8)}, "c.weight: found integers"),
    ],
)
def test_unsound_tensors_are_named(tmp_path, change, message):
    tensors, _ = layer(4, False, np.random.default_rng(0))
    tensors = {k: v for k, v in (tensors | change).items() if v is not None}
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization(4, False)))


def test_integers_in_a_plain_folder_are_refused(tmp_path):
    tensors, _ = layer(8, True, np.random.default_rng(0))
    with pytest.raises(FormatError, match="dtype 'I8'"):
        files.read(save(tmp_path, tensors, None))
