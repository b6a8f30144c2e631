"""Quantized folders in the layouts of other libraries: those that the libraries packed, then bytes packed
here by plain loops, and unsound ones.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from folders import complete
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from edgeq import EdgeqError, FormatError, arch, cli, files, formats, kernels, quantizers, uniform
from edgeq.convert import exact
from edgeq.convert.huggingface import to_huggingface
from edgeq.files import bitsandbytes
from edgeq.files import eetq as eetq_layout
from edgeq.grid import Grid, decode
from edgeq.quantizers import eetq

GOLDEN = Path(__file__).parent / "golden" / "foreign"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def save(folder, tensors, quantization):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def golden(name):
    """Tensors and quantization_config that a library wrote."""
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as f:
        return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["quantization_config"])  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_what_the_libraries_packed(tmp_path, name):
    tensors, quantization = golden(name)
    read = files.read(save(tmp_path, tensors, quantization))[1]
    assert read.keys() == {"a.weight", "expected.weight"}
    weight, expected = read["a.weight"], tensors["expected.weight"]
    w = formats.dequantize(weight)
    assert w.shape == expected.shape == weight.shape
    tolerance = 1e-3 if weight.format == "f16" else 1e-6
    np.testing.assert_allclose(w, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["awq-4", "bitnet-bitlinear", "gptq-3-order", "gptq-4-order", "hqq-2", "bitsandbytes-nf4"]
)
def test_the_kernels_compute_with_them(tmp_path, name):
    weight = files.read(save(tmp_path, *golden(name)))[1]["a.weight"]
    w = formats.dequantize(weight)
    x = np.random.default_rng(0).normal(size=(3, w.shape[1])).astype(np.float32)
    f = kernels.backend("numba").linear([weight, weight])
    for n in (1, 3):
        expected = np.tile(x[:n] @ w.T, 2)
        # of 8 and 16 bits for inputs, and of levels that are no integers
        tolerance = {"ternary": 0.02, "nf4": 0.01}.get(weight.format, 1e-4)
        np.testing.assert_allclose(f(x[:n]), expected, atol=tolerance * np.abs(expected).max())


def plain(bits, rng, *, rows=32, cols=64, group=32, zeros=True):
    """Codes, scales and zero points of a layer, and its weights, in float64."""
    q = rng.integers(0, 1 << bits, (rows, cols))
    scale = rng.uniform(0.01, 1, (rows, cols // group)).astype(np.float16)
    zero = rng.integers(0, 1 << bits, scale.shape) if zeros else np.full(scale.shape, 1 << bits - 1)
    of = np.arange(cols) // group
    return q, scale, zero, scale.astype(float)[:, of] * (q - zero[:, of])


def in_words(codes, bits, order=None):
    """A row of codes in words of 32 bits, low bits first, by Python's integers; `order` is that of a word."""
    whole = 0
    for i, _ in enumerate(codes):
        at = i if order is None else i // 8 * 8 + order[i % 8]
        whole |= int(codes[at]) << bits * i
    return [whole >> 32 * i & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


def gptq_layer(bits, rng, *, v2=True, order=None, group=32, zeros=True, cols=64):
    q, scale, zero, w = plain(bits, rng, cols=cols, group=group, zeros=zeros)
    order = np.arange(cols) if order is None else order
    tensors = {
        "a.qweight": np.array([in_words(row[np.argsort(order)], bits) for row in q], np.uint32).T,
        "a.qzeros": np.array([in_words(row, bits) for row in (zero if v2 else zero - 1).T], np.uint32),
        "a.scales": np.ascontiguousarray(scale.T),
        "a.g_idx": (np.argsort(order) // group).astype(np.int32),
    }
    tensors = {
        k: np.ascontiguousarray(v.view(np.int32) if v.dtype == np.uint32 else v) for k, v in tensors.items()
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": not zeros}
    return tensors, w[:, np.argsort(order)], config | {"checkpoint_format": "gptq_v2" if v2 else "gptq"}


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([16, 32, 96, 192]),
    ordered=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_gptq_by_hand(tmp_path_factory, bits, group, ordered, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(192) if ordered else None
    tensors, w, config = gptq_layer(bits, rng, order=order, group=group, cols=192)
    read = files.read(save(tmp_path_factory.mktemp("a"), tensors, config))[1]["a.weight"]
    assert read.format == f"i{bits}"
    assert (read.order is not None) == (ordered and group < 192)
    np.testing.assert_allclose(formats.dequantize(read), w, rtol=1e-6, atol=1e-5)


def test_zero_points_of_gptq_that_say_the_other_version(tmp_path):
    rng = np.random.default_rng(0)
    for v2, said in ((True, "gptq"), (False, "gptq_v2")):
        tensors, w, config = gptq_layer(4, rng, v2=v2, zeros=False)
        read = files.read(save(tmp_path / said, tensors, config | {"checkpoint_format": said}))[1]["a.weight"]
        assert read.parts.keys() == {"scale"}
        np.testing.assert_allclose(formats.dequantize(read), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_0_borrows_in_version_1(tmp_path, bits):
    """As GPTQModel subtracts one from each, in words."""
    tensors, _, config = gptq_layer(bits, np.random.default_rng(0))
    tensors["a.qzeros"] &= np.int32(-1 << bits)
    v2 = files.read(save(tmp_path / "2", tensors, config))[1]["a.weight"]
    assert (v2.parts["zero"] == 0).any()
    ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
    tensors["a.qzeros"] = (tensors["a.qzeros"].view(np.uint32) - ones).view(np.int32)
    v1 = files.read(save(tmp_path / "1", tensors, config | {"checkpoint_format": "gptq"}))[1]["a.weight"]
    assert np.array_equal(v1.parts["zero"], v2.parts["zero"])


def eetq_bytes(q):
    """EETQ's four steps on int8 (in, out), one after the other, as their authors describe them."""
    cols, rows = q.shape
    permuted = q.copy()
    for base in range(0, cols, 16):
        for row, read in enumerate((0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)):
            permuted[base + row] = q[base + read]
    flat = [0] * q.size
    for column in range(rows):
        for row in range(cols):
            tile, within = divmod(row, 64)
            flat[column // 2 * cols * 2 + tile * 128 + column % 2 * 64 + within] = int(permuted[row, column])
    flat = [(value + 128) % 256 for value in flat]
    for base in range(0, q.size, 4):
        flat[base + 1], flat[base + 2] = flat[base + 2], flat[base + 1]
    return np.array(flat, np.uint8).view(np.int8).reshape(cols, rows)


def test_eetq_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    q, scale = (
        rng.integers(-128, 128, (192, 128)).astype(np.int8),
        rng.uniform(0.01, 1, 128).astype(np.float16),
    )
    tensors = {"a.weight": eetq_bytes(q), "a.weight_scales": scale}
    read = files.read(save(tmp_path, tensors, {"quant_method": "eetq", "weights": "int8"}))[1]["a.weight"]
    assert np.array_equal(formats.dequantize(read), (q * scale.astype(np.float32)).T)
    assert np.array_equal(eetq_layout.spread(q.T.view(np.uint8) ^ 128).view(np.int8), tensors["a.weight"])


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq-4-order", {"g_idx": np.full(64, 2, np.int32)}, "g_idx: found group 2, expected groups 0 to 1"),
        ("gptq-4-order", {"g_idx": np.full(64, -1, np.int32)}, "g_idx: found group -1"),
        (
            "gptq-4-order",
            {"g_idx": np.zeros(64, np.int32)},
            "g_idx: found groups of 0 to 64, expected all of 32",
        ),
        ("gptq-4-order", {"g_idx": np.zeros(63, np.int32)}, r"g_idx: found shape \(63,\)"),
        ("gptq-4-order", {"g_idx": np.zeros(64, np.float32)}, "g_idx: found floating-point"),
        ("gptq-4-asym", {"qzeros": None}, "a.qzeros: found none"),
        ("gptq-4-asym", {"qzeros": np.zeros((2, 3), np.int32)}, "qzeros: found shape"),
        ("gptq-4-asym", {"scales": np.ones((3, 32), np.float16)}, "scales: found 3 groups of 64 columns"),
        ("gptq-4-asym", {"scales": np.ones((2, 31), np.float16)}, r"scales: found shape \(2, 31\)"),
        ("gptq-4-asym", {"scales": np.ones((2, 32), np.int32)}, "scales: found integers"),
        ("gptq-4-asym", {"qweight": np.zeros((8, 0), np.int32)}, "qweight: found shape"),
        ("gptq-3-asym", {"qweight": np.zeros((8, 32), np.int32)}, "qweight: found shape"),
        ("gptq-4-asym", {"other": np.zeros(4, np.int32)}, "a.other: found integers"),
        ("gptq-4-asym", {"weight": np.zeros(4, np.float32)}, "a.weight: found a weight"),
        ("awq-4", {"qzeros": np.zeros((2, 3), np.int32)}, "qzeros: found shape"),
        ("awq-4", {"qweight": np.zeros(64, np.int32)}, "qweight: found shape"),
        ("awq-4", {"scales": np.ones((1, 32), np.float16)}, "scales: found 1 groups"),
        ("hqq-4", {"packing": np.frombuffer(b"5bit_u8", np.uint8)}, "packing: found 5bit_u8"),
        ("hqq-4", {"view_as_float": np.array(1, np.uint8)}, "view_as_float: found 1, expected 0"),
        ("hqq-4", {"axis": np.array(2, np.int32)}, "axis: found 2"),
        ("hqq-4", {"group_size": np.array(0, np.int32)}, "group_size: found 0"),
        ("hqq-4", {"group_size": np.array(48, np.int32)}, "group_size: found 48"),
        ("hqq-4", {"shape": np.array([-1, -64])}, "group_size: found 32, for"),
        ("hqq-4", {"shape": np.array([32, 128])}, "W_q: found shape"),
        ("hqq-3", {"W_q": np.zeros((6, 32), np.int32)}, "W_q: found shape"),
        ("hqq-4", {"scale": np.ones((63, 1), np.float16)}, "scale: found shape"),
        ("bitnet-bitlinear", {"weight": np.full((8, 64), 0xC0, np.uint8)}, "code 3 of output 24, input 0"),
        ("bitnet-bitlinear", {"weight_scale": np.zeros(1, np.float32)}, "weight_scale: found 0"),
        ("bitnet-bitlinear", {"weight_scale": np.ones(2, np.float32)}, "weight_scale: found shape"),
        ("bitnet-bitlinear", {"weight_scale": None}, "weight_scale: found none"),
    ],
)
def test_unsound_tensors_are_named(tmp_path, name, change, message):
    tensors, quantization = golden(name)
    tensors = {k: v for k, v in (tensors | {f"a.{k}": v for k, v in change.items()}).items() if v is not None}
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq-4-sym", {"bits": 5}, "bits: found 5, expected 2 or 3 or 4 or 8"),
        ("gptq-4-sym", {"bits": True}, "bits: found True"),
        ("gptq-4-sym", {"sym": 1}, "sym: found 1, expected True or False"),
        ("gptq-4-sym", {"group_size": 0}, "group_size: found 0"),
        ("gptq-4-sym", {"checkpoint_format": "marlin"}, "checkpoint_format: found 'marlin'"),
        ("gptq-4-sym", {"dynamic": {"a": {"bits": 8}}}, "dynamic"),
        ("awq-4", {"bits": 8}, "bits: found 8, expected 4"),
        ("awq-4", {"version": "gemv"}, "version: found 'gemv'"),
        ("awq-4", {"zero_point": False}, "zero_point: found False"),
        ("hqq-4", {"quant_config": None}, "quant_config: found None"),
        ("bitsandbytes-nf4", {"load_in_4bit": False}, "load_in_4bit: found False"),
        ("bitsandbytes-nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: found 'fp4'"),
        ("bitnet-bitlinear", {"quantization_mode": "online"}, "quantization_mode: found 'online'"),
        ("bitnet-bitlinear", {"use_rms_norm": True}, "use_rms_norm: found True"),
        ("bitnet-bitlinear", {"linear_class": "other"}, "linear_class: found 'other'"),
        ("bitnet-bitlinear", {"quant_method": "eetq", "weights": "int4"}, "weights: found 'int4'"),
        (
            "bitnet-bitlinear",
            {"quant_method": "eetq"},
            r"weight: found shape \(8, 64\), expected multiples of 64",
        ),
    ],
)
def test_configs_of_other_kinds_are_refused(tmp_path, name, change, message):
    tensors, quantization = golden(name)
    with pytest.raises(FormatError, match=message):
        files.read(save(tmp_path, tensors, quantization | change))


def square(folder):
    """A model whose matrices have sides of multiples of 64, which EETQ's layout wants."""
    folder = complete("qwen3", folder, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    rng, shapes = np.random.default_rng(0), {"q_proj": (64, 64), "k_proj": (64, 64), "v_proj": (64, 64)}
    shapes |= {"o_proj": (64, 64), "q_norm": (16,), "k_norm": (16,)}
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, w in tensors.items():
        shape = shapes.get(name.split(".")[-2], w.shape)
        tensors[name] = (rng.normal(size=shape) / 8).astype(w.dtype) + (w.ndim == 1)
    safetensors.numpy.save_file(tensors, path)
    return folder


def logits(path, backend="numpy"):
    model = arch.load(*files.read(path), backend=backend)
    return model(list(range(12)), model.new_cache(12), "all")


WRITTEN = [
    ("gptq", "int2", True), ("gptq", "int3", False), ("gptq", "int4", False), ("gptq", "int8", True),
    ("awq", "int4", False), ("hqq", "int8", False), ("hqq", "int4", False), ("hqq", "int3", False),
    ("hqq", "int2", False), ("eetq", "int8", True), ("bitnet", "ternary", True),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "outtype", "symmetric"), WRITTEN)
def test_writing(tmp_path, layout, outtype, symmetric):
    """What is written reads as the numbers that were meant; written once more, it has the same bytes."""
    source = square(tmp_path / "source")
    group = None if layout in ("eetq", "bitnet") else 32
    made = to_huggingface(source, tmp_path / "made", outtype, layout=layout, group=group, symmetric=symmetric)
    (meta, read), whole = files.read(made), files.read(source)[1]
    assert meta["config"]["quantization_config"]["quant_method"] == layout
    for name, tensor in read.items():
        w, coded = formats.dequantize(whole[name]), formats.dequantize(tensor)
        if "proj" not in name:
            assert np.array_equal(w, coded)
        elif layout != "bitnet":
            assert tensor.format == f"i{outtype[3:]}"
            reach = np.ptp(w.reshape(len(w), -1, group or w.shape[1]), axis=2).max()
            assert np.abs(w - coded).max() <= 1.2 * reach / (2 ** int(outtype[3:]) - 1)
        else:
            scale = np.abs(w).mean()
            np.testing.assert_allclose(coded, scale * np.clip(np.rint(w / scale), -1, 1), rtol=1e-5)
    again = to_huggingface(made, tmp_path / "again", "auto", layout=layout)
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_act_order_is_kept_and_runs(tmp_path):
    source = to_huggingface(square(tmp_path / "source"), tmp_path / "made", "int4", layout="gptq", group=32)
    rng, path = np.random.default_rng(0), source / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, value in tensors.items():
        if name.endswith("g_idx"):
            tensors[name] = rng.permutation(value)
    safetensors.numpy.save_file(tensors, path)
    read = files.read(source)[1]
    assert all(t.order is not None for name, t in read.items() if "proj" in name)
    expected = logits(source)
    for n in (1, 12):  # by the same program, too
        model = arch.load(*files.read(source), backend="numba")
        cache = model.new_cache(12)
        y = np.concatenate([model(list(range(i, i + n)), cache, "all") for i in range(0, 12, n)])
        np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())
    again = to_huggingface(source, tmp_path / "again", "auto", layout="gptq")
    kept = safetensors.numpy.load_file(again / "model.safetensors")
    assert kept.keys() == tensors.keys()
    assert all(np.array_equal(kept[name], tensors[name]) for name in kept)
    with pytest.raises(EdgeqError, match="act-order"):
        to_huggingface(source, tmp_path / "other", "auto", layout="awq")
    with pytest.raises(EdgeqError, match="no type for groups that are no neighbors"):
        quantizers.quantize(source, tmp_path / "x.gguf", "copy")
    quantizers.quantize(source, tmp_path / "x.gguf", "f32", allow_requantize=True)
    np.testing.assert_allclose(logits(tmp_path / "x.gguf"), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "outtype", "symmetric", "type"),
    [
        ("gptq", "int4", True, "q4_0"),
        ("gptq", "int4", False, "q5_0"),
        ("awq", "int4", False, "q5_0"),
        ("gptq", "int3", False, "q4_0"),
        ("gptq", "int2", True, "q4_0"),
        ("eetq", "int8", True, "q8_0"),
        ("gptq", "int8", True, "q8_0"),
    ],
)
def test_gguf_files_hold_the_same_numbers(tmp_path, layout, outtype, symmetric, type):
    source = square(tmp_path / "source")
    made = to_huggingface(source, tmp_path / "made", outtype, layout=layout, symmetric=symmetric)
    quantizers.quantize(made, tmp_path / "x.gguf", "copy")
    meta, tensors = files.read(tmp_path / "x.gguf")
    _, _, named = arch.identify(*files.read(made), made)
    for name, tensor in tensors.items():
        if "blk" in name and len(tensor.shape) == 2:
            assert tensor.format == type, name
            w, ours = formats.dequantize(tensor), formats.dequantize(named[name])
            assert np.array_equal(np.sort(w, axis=None), np.sort(ours, axis=None))  # rows may have moved
    assert np.array_equal(logits(tmp_path / "x.gguf"), logits(made))


def test_ternary_in_gguf(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (8, 512)).astype(np.uint8)
    scale = np.full((8, 1), 0.25, np.float32)
    tensor = formats.pack("ternary", codes, Grid(np.array([-1, 0, 1], np.int8), scale))
    held = exact.hold(tensor)
    assert (held.tensor.format, held.error) == ("tq2_0", 0)
    assert np.array_equal(formats.dequantize(held.tensor), formats.dequantize(tensor))
    signs = formats.pack("binary", codes % 2, Grid(np.array([0, 1], np.int8), 2 * scale, -scale))
    held = exact.hold(signs)
    assert (held.tensor.format, held.error) == ("tq2_0", 0)
    assert np.array_equal(formats.dequantize(held.tensor), formats.dequantize(signs))


def test_what_gguf_cannot_hold_is_said(tmp_path):
    source = square(tmp_path / "source")
    made = to_huggingface(source, tmp_path / "made", "int4", layout="hqq")
    with pytest.raises(
        EdgeqError, match="no type for i4 with offsets of more bits than float16 has. Weights in q4_1"
    ):
        quantizers.quantize(made, tmp_path / "x.gguf", "copy")
    made = to_huggingface(source, tmp_path / "other", "int4")
    path = made / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, value in tensors.items():
        if name.endswith("scale"):
            tensors[name] = value.astype(np.float32) * np.float32(1.0003)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(EdgeqError, match="no type for i4 with scales such as .* q4_0 would be off by up to"):
        quantizers.quantize(made, tmp_path / "x.gguf", "copy")
    words = ["convert", str(made), str(tmp_path / "x.gguf"), "--outtype", "nearest"]
    assert CliRunner().invoke(cli.edgeq, words, catch_exceptions=False).exit_code == 0
    expected = logits(made)
    np.testing.assert_allclose(logits(tmp_path / "x.gguf"), expected, atol=0.01 * np.abs(expected).max())


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, 192]),
    zeros=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_exactly_where_it_says_so(bits, group, zeros, whole, seed):
    """The error is what it is said to be, none with float16 scales and codes that fit."""
    q, scale, zero, w = plain(bits, np.random.default_rng(seed), cols=192, group=group, zeros=zeros)
    scale = scale.astype(np.float32) * np.float32(1 if whole else 1.0003)
    grid = uniform.grid_of(bits, scale, zero.astype(np.uint8) if zeros else None)
    tensor = formats.pack(f"i{bits}", q.astype(np.uint8), grid)
    if bits == 8 and zeros and (np.abs(q - zero[:, np.arange(192) // group]) > 127).any():
        with pytest.raises(EdgeqError, match="no type for i8"):
            exact.hold(tensor)
        return
    held = exact.hold(tensor)
    ours, theirs = formats.dequantize(tensor), formats.dequantize(held.tensor)
    assert held.error == pytest.approx(np.abs(ours - theirs).max() / np.abs(ours).max())
    assert (held.error == 0) == np.array_equal(ours, theirs)
    if whole:
        assert held.error == 0
        np.testing.assert_allclose(theirs, w, rtol=1e-6)
    else:
        assert held.error < 2**-10


def test_layouts_say_what_they_hold(tmp_path):
    source = square(tmp_path / "source")
    for layout, outtype, message in (
        ("awq", "int8", "awq holds 4 bits, not i8"),
        ("eetq", "int4", "eetq holds 8 bits in whole rows, not i4 in groups"),
        ("bitnet", "int2", "bitnet holds -1, 0 and 1"),
        ("hqq", "ternary", "hqq holds 1, 2, 3, 4 or 8 bits in groups, not ternary"),
        ("gptq", "auto", "layers have no integers"),
    ):
        with pytest.raises(EdgeqError, match=message):
            to_huggingface(source, tmp_path / "made", outtype, layout=layout)
    with pytest.raises(ValueError, match="layout 'gptq', expected one of .* and integers"):
        to_huggingface(source, tmp_path / "made", "f16", layout="gptq")
    with pytest.raises(ValueError, match="layout 'other'"):
        to_huggingface(source, tmp_path / "made", "int4", layout="other")
    narrow = complete("qwen3", tmp_path / "narrow")
    with pytest.raises(FormatError, match="found 32 rows of 64 columns, expected multiples of 64"):
        to_huggingface(narrow, tmp_path / "made", "int8", layout="eetq")
    words = ["convert", str(source)]
    for more, message in (
        ([str(tmp_path / "x.gguf"), "--layout", "gptq"], "gptq is for folders"),
        ([str(tmp_path / "x.gguf"), "--outtype", "int4"], "int4 is for folders"),
        ([str(tmp_path / "made"), "--outtype", "nearest"], "nearest is for GGUF files"),
    ):
        result = CliRunner().invoke(cli.edgeq, [*words, *more])
        assert (result.exit_code, message in result.output) == (2, True)
    made = ["--outtype", "int4", "--layout", "gptq", "--group-size", "32", "--asymmetric"]
    result = CliRunner().invoke(cli.edgeq, [*words, str(tmp_path / "made"), *made], catch_exceptions=False)
    assert result.exit_code == 0


def test_eetq_rounds_no_weight_away(tmp_path):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 128)).astype(np.float32)
    w[3] = 0
    codes, grid = eetq.eetq(w)
    error = np.abs(w - decode(codes, grid))
    assert (error <= np.abs(grid.scale) * 0.5 + 128 * np.abs(grid.scale) * 2**-11).all()
    published = np.abs(w).max(axis=1, keepdims=True) / 128
    theirs = w - published * np.clip(np.rint(w / np.where(published, published, 1)), -128, 127)
    assert (error**2).sum() < (theirs**2).sum()
    for unsound in (np.inf, np.nan, 1e8):
        w[0, 0] = unsound
        with pytest.raises(ValueError, match="EETQ holds"):
            eetq.eetq(w)
    with pytest.raises(ValueError, match="q4_0 does not hold"):
        eetq.eetq_onto("q4_0", np.ones((1, 32), np.float32))


def test_eetq_folders_and_files_are_the_same(tmp_path):
    source = square(tmp_path / "source")
    made = eetq.to_folder(source, tmp_path / "made")
    quantizers.quantize(source, tmp_path / "x.gguf", "q8_0", method="eetq")
    a, b = files.read(made)[1], files.read(tmp_path / "x.gguf")[1]
    ours = formats.dequantize(a["model.layers.0.mlp.down_proj.weight"])
    assert np.array_equal(ours, formats.dequantize(b["blk.0.ffn_down.weight"]))
    expected = logits(made)
    np.testing.assert_allclose(logits(made, "numba"), expected, atol=0.02 * np.abs(expected).max())


def test_runs_of_normal_floats_go_on_from_row_to_row(tmp_path):
    """As bitsandbytes has them on GPUs; on a CPU it decodes such rows wrong."""
    tensors, quantization = golden("bitsandbytes-nf4-nested")
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes())
    for change in ({"shape": [640, 32]}, {"shape": [640, 32], "dtype": "float16"}):
        tensors[name] = np.frombuffer(json.dumps(state | change).encode(), np.uint8)
        weight = files.read(save(tmp_path, tensors, quantization))[1]["a.weight"]
        assert weight.format == ("f16" if "dtype" in change else "f32")
        expected = tensors["expected.weight"].reshape(640, 32)
        np.testing.assert_allclose(formats.dequantize(weight), expected, rtol=1e-3, atol=1e-6)
    for change in ({"shape": [0, 32]}, {"shape": [640, 31]}, {"blocksize": "64"}, {"nested_offset": "x"}):
        tensors[name] = np.frombuffer(json.dumps(state | change).encode(), np.uint8)
        with pytest.raises(FormatError, match=r"a\.weight"):
            files.read(save(tmp_path, tensors, quantization))


def test_normal_floats_are_as_bitsandbytes_has_them(tmp_path):
    """Its map of scales, the names of its tensors, and a model whose scales are quantized a second time."""
    stored = golden("bitsandbytes-nf4-nested")[0]
    np.testing.assert_allclose(bitsandbytes.dynamic(), stored["a.weight.nested_quant_map"], atol=1e-7)
    source = square(tmp_path / "source")
    made = to_huggingface(source, tmp_path / "made", "nf4")
    tensors, name = files.read(made)[1], "model.layers.0.mlp.down_proj.weight"
    w = formats.dequantize(files.read(source)[1][name])
    once = formats.dequantize(formats.quantize("nf4", w))
    twice = formats.dequantize(tensors[name])
    assert tensors[name].format == "nf4"
    assert np.linalg.norm(twice - once) < 0.1 * np.linalg.norm(once - w)
    with safe_open(made / "model.safetensors", "np") as f:
        assert {key.removeprefix(f"{name}.") for key in f.keys() if key.startswith(f"{name}.")} == {  # noqa: SIM118
            key.removeprefix("a.weight.") for key in stored if key.startswith("a.weight.")
        }
    exact, fast = logits(made), logits(made, "numba")
    np.testing.assert_allclose(fast, exact, atol=0.05 * np.abs(exact).max())


def test_pickles_are_refused(tmp_path):
    folder = save(tmp_path, {}, GPTQ)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "qmodel.pt"):
        (folder / name).write_bytes(b"PK\3\4")
        with pytest.raises(FormatError, match=f"{name}, a pickle.*any code") as error:
            files.read(folder)
        assert "safetensors" in str(error.value)
        (folder / name).unlink()
