"""Integers in groups as types of `quantize`: what each method makes of them, and the folders that hold it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from folders import complete

import edgeq
from edgeq import arch, cli, files, formats, quantizers, uniform
from edgeq.errors import EdgeqError
from edgeq.grid import decode, encode
from edgeq.quantizers import layerwise
from edgeq.quantizers.layerwise import Calibration
from edgeq.quantizers.target import target

TEXT = "the 12 cats of 345 and the dog's tail. Then they went home, all of them! " * 40
QUICK = Calibration(TEXT, chunks=6, ctx=32, backend="numpy")
IDS = list(range(5, 37))


@pytest.fixture
def folder(tmp_path):
    return complete("llama", tmp_path / "source")


def logits(path):
    model = arch.load(*files.read(path), backend="numpy")
    return model(IDS, model.new_cache(len(IDS)), "all")


def named(path):
    """Tensors of a folder, by GGUF's names."""
    return arch.identify(*files.read(path), path)[2]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("i8", (8, None, True)),
        ("i4-g64", (4, 64, True)),
        ("i3-g16-asym", (3, 16, False)),
        ("i2-asym", (2, None, False)),
        ("i1-g32-asym", (1, 32, False)),
        ("i5-g64", None),
        ("i4-asym-g64", None),
        ("q4_0", None),
    ],
)
def test_names(name, kind):
    assert uniform.kind(name) == kind


@pytest.mark.parametrize("name", ["i4-g64-asym", "i3-g32", "i2-g16-asym", "i1-g32-asym", "i8-g64-asym", "i4"])
def test_names_are_formats(name):
    """Whose fit does what the name says, and whose tensors are of the format before it."""
    w = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    kind, tensor = uniform.kind(name), formats.quantize(name, w)
    assert tensor.format == kind.format
    assert tensor.parts["scale"].shape == (8, 128 // (kind.group or 128))
    assert tensor.parts.keys() == ({"scale"} if kind.symmetric else {"scale", "zero"})
    assert tensor.nbytes - tensor.data.nbytes == 8 * formats.apart_bytes(name, 128) or kind.group is None
    np.testing.assert_array_equal(formats.dequantize(tensor), decode(*formats.unpack(tensor)))
    grid = target(name, 128).fit(w, None)
    np.testing.assert_array_equal(formats.dequantize(tensor), decode(encode(w, grid), grid))


@pytest.mark.parametrize(
    ("method", "type", "layout"),
    [
        ("rtn", "i4-g32-asym", None),
        ("rtn", "i3-g32", "gptq"),
        ("rtn", "i8", None),
        ("gptq", "i3-g32-asym", None),
        ("gptq", "i2-g32-asym", "gptq"),
        ("awq", "i4-g32-asym", "awq"),
        ("awq+gptq", "i4-g32", None),
        ("hqq", "i4-g32-asym", None),
        ("hqq", "i2-g32-asym", None),
        ("hqq", "i1-g32-asym", None),
        ("gptq", "i1-g32-asym", "hqq"),
    ],
)
def test_folders_hold_what_methods_choose(folder, tmp_path, method, type, layout):
    plan = layerwise.apply(method, quantizers.plan(folder, type), QUICK)
    [made] = quantizers.write(plan, tmp_path / "made", layout=layout)
    kind, read, source = uniform.kind(type), named(made), named(folder)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == layout or ("hqq" if method == "hqq" else "compressed-tensors")
    for r in plan.recodings:
        tensor, name = read[r.tensor.name], r.tensor.name
        if not name.startswith("blk.") or len(tensor.shape) == 1:
            if method.startswith("awq") and "norm" in name:
                continue
            np.testing.assert_array_equal(formats.dequantize(tensor), formats.dequantize(source[name]))
            continue
        assert (tensor.format, tensor.parts["scale"].shape[1]) == (
            kind.format,
            tensor.cols // (kind.group or tensor.cols),
        )
        # rows may have another order in the folder
        ours = r.tensor if r.tensor.parts else formats.quantize(type, formats.dequantize(r.tensor))
        w, stored = formats.dequantize(ours), formats.dequantize(tensor)
        np.testing.assert_array_equal(np.sort(w, axis=0), np.sort(stored, axis=0))
    assert np.isfinite(logits(made)).all()


def test_a_layout_changes_no_number(folder, tmp_path):
    plan = layerwise.apply("gptq", quantizers.plan(folder, "i4-g32-asym"), QUICK)
    made = [
        named(quantizers.write(plan, tmp_path / layout, layout=layout)[0])
        for layout in ("compressed-tensors", "gptq", "awq", "hqq")
    ]
    for other in made[1:]:
        for name, tensor in made[0].items():
            np.testing.assert_array_equal(formats.dequantize(tensor), formats.dequantize(other[name]))


def test_methods_in_their_order(folder):
    """Each leaves less of the layers' error than the one before, summed over all matrices."""
    lost = {}
    for method in ("gptq", "awq", "hqq"):
        errors = {}
        plan = quantizers.plan(folder, "i3-g32-asym")
        layerwise.apply(method, plan, QUICK, found=errors.__setitem__)
        assert errors.keys() == {r.tensor.name for r in plan.recodings if r.format == "i3-g32-asym"}
        lost[method] = sum(errors.values())
    assert lost["gptq"] < lost["awq"] < lost["hqq"]


def test_hqq_finds_no_worse_than_rounding(folder, tmp_path):
    plan = quantizers.plan(folder, "i3-g32-asym")
    made = layerwise.apply("hqq", plan, QUICK)
    before = layerwise.arranged(plan)
    for after in made.recodings:
        if after.tensor.parts:
            w, coded = (formats.dequantize(t) for t in (before[after.tensor.name], after.tensor))
            grid = uniform.covering(w, 3, 32)
            plain = decode(encode(w, grid), grid)
            assert (np.abs(w - coded) ** 0.7).sum() < (np.abs(w - plain) ** 0.7).sum()
    assert any(r.tensor.parts["zero"].dtype == np.float16 for r in made.recodings if r.tensor.parts)
    with pytest.raises(EdgeqError, match="zero points are no integers, which only hqq can say"):
        quantizers.write(made, tmp_path / "made", layout="gptq")


@pytest.mark.parametrize("value", [0, 0.3, -1e-6, 1e4])
def test_groups_of_one_value_keep_it(value):
    w = np.full((2, 64), value, np.float32)
    w[1, ::2] *= np.float32(1.0001)
    grid = uniform.covering(w, 4, 32)
    np.testing.assert_allclose(decode(encode(w, grid), grid), w, rtol=2e-3, atol=3e-8)
    with pytest.raises(ValueError, match="float16 holds 65504 at most"):
        formats.quantize("i4-g32", w + np.float32(1e9))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out.gguf", "i4-g32"], "GGUF files have no type for i4-g32: name a folder"),
        (["out", "i4-g64"], "96 columns, which are no whole groups of 64. Take groups that divide them"),
        (["out", "i4-g40"], "i4-g40: groups of 40 columns, expected 16 or a multiple of 32"),
        (["out", "i4-g32", "--pure"], "i4-g32 is for all layers of a folder, without pure"),
        (["out", "i3-g32", "--layout", "awq"], "awq holds 4 bits, not i3 in groups"),
        (["out", "i4-g32-asym", "--method", "hqq", "--layout", "gptq"], "which gptq does not hold"),
        (["out", "i4-g32", "--method", "hqq"], "no matrix gets a type with offsets"),
        (["out.gguf", "q4_0", "--layout", "gptq"], "the layout gptq is for integers in folders"),
        (["out.gguf", "--method", "aqlm"], "GGUF files have no type for aqlm: name a folder"),
        (["out", "q4_0", "--method", "ternary"], "Take the type copy"),
    ],
)  # fmt: skip
def test_what_is_refused_at_once(folder, tmp_path, words, message):
    given = ["quantize", str(folder), str(tmp_path / words[0]), *words[1:]]
    done = CliRunner().invoke(cli.edgeq, given)
    assert message in (str(done.exception) if isinstance(done.exception, EdgeqError) else done.output)
    assert done.exit_code != 0
    assert not (tmp_path / words[0]).exists()


def test_a_quantized_source(folder, tmp_path):
    edgeq.quantize(folder, tmp_path / "small.gguf", "q8_0")
    with pytest.raises(EdgeqError, match="is q8_0 already, and would lose a second time"):
        quantizers.plan(tmp_path / "small.gguf", "i4-g32")
    plan = quantizers.plan(tmp_path / "small.gguf", "i4-g32", allow_requantize=True)
    [made] = quantizers.write(plan, tmp_path / "made")
    assert {t.format for t in files.read(made)[1].values()} == {"i4", "f16", "f32"}
