"""Static and dynamic quantization, SmoothQuant, and few values, on whole models: what the folders hold, that
they say what is computed, and what each method promises.
"""

import json
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from folders import GOLDEN, complete
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import edgeq
from edgeq import arch, calibrate, cli, files, formats, quantizers
from edgeq.convert.huggingface import to_huggingface
from edgeq.errors import EdgeqError
from edgeq.grid import decode, encode
from edgeq.inputs import Inputs
from edgeq.observers import make
from edgeq.quantizers import binary, layerwise, smooth, ternary
from edgeq.quantizers.gptq import gptq
from edgeq.quantizers.layerwise import Calibration
from edgeq.quantizers.target import Target

TEXT = "the 12 cats of 345 and the dog's tail. Then they went home, all of them! " * 40
QUICK = Calibration(TEXT, chunks=6, ctx=32, backend="numpy")
IDS = list(range(5, 37))
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(request, tmp_path):
    return complete(getattr(request, "param", "llama"), tmp_path / "source")


def written(folder, method, **options):
    """The folder that a method makes."""
    made = folder.parent / f"{method}-{len(options)}"
    [path] = quantizers.quantize(
        folder, made, "copy", method=method, method_options=options, calibration=QUICK
    )
    assert path == made
    return made


def logits(path, backend="numpy", cache=("f32", "f32")):
    model = arch.load(*files.read(path), backend=backend, cache_types=cache)
    return model(IDS, model.new_cache(len(IDS)), "all")


def layers(path):
    """Tensors of the layers."""
    return {name: t for name, t in files.read(path)[1].items() if t.parts}


# ---- observing


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_observers_see_what_linears_are_given(backend):
    model, windows = arch.load(*files.read(GOLDEN / "llama"), backend=backend), np.array([IDS, IDS[::-1]])
    done = []
    seen = calibrate.observe(
        model, windows, partial(make, "minmax", "channel"), progress=lambda *a: done.append(a)
    )
    exact, x = arch.load(*files.read(GOLDEN / "llama"), backend="numpy"), {}

    def watch(linear):
        def look(given):
            x.setdefault(linear.names, []).append(np.array(given))
            return linear(given)

        return look

    with calibrate.replaced(exact, watch):
        for window in windows:
            exact.hidden(window.tolist(), exact.new_cache(len(IDS)))
    assert seen.keys() == {names for names in x if names[0].startswith("blk.")}
    for names, observer in seen.items():
        values = np.concatenate(x[names])
        for ours, end in zip(observer.range(8, True), (values.min(axis=0), values.max(axis=0)), strict=True):
            np.testing.assert_allclose(ours[:, 0], end, atol=0.02 * np.abs(values).max())
    assert done == [("observing", i, 2) for i in range(3)]
    assert model.network.layers[0].qkv.names == exact.network.layers[0].qkv.names  # put back


# ---- static and dynamic


@pytest.mark.parametrize("folder", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize(
    ("method", "options", "limit"),
    [
        ("static", {}, 0.3),
        ("static", {"symmetric": False, "observer": "mse"}, 0.3),
        ("static", {"per": "tensor", "observer": "percentile", "percent": 99.9}, 0.4),
        ("smooth+static", {"alpha": 0.2}, 0.4),
        ("dynamic", {}, 0.15),
        ("dynamic", {"inputs": "block", "per": "tensor"}, 0.15),
    ],
)
def test_folders_run(folder, method, options, limit):
    made = written(folder, method, **options)
    base, ours = logits(folder), logits(made)
    assert np.abs(ours - base).mean() < limit
    share = options.get("inputs", "token") if method == "dynamic" else "tensor"
    for name, tensor in layers(made).items():
        assert (tensor.format, tensor.inputs.share) == ("i8", share), name
        assert np.ptp(tensor.parts["scale"]) == 0 or options.get("per") != "tensor"


def test_what_a_folder_says(folder):
    made = written(folder, "static", symmetric=False, per="tensor")
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    assert config["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "tensor"
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }
    inputs = layers(made)[f"{UP}.weight"].inputs
    with safe_open(made / "model.safetensors", "np") as held:
        assert held.get_tensor(f"{UP}.weight_scale").shape == (1,)
        np.testing.assert_array_equal(held.get_tensor(f"{UP}.input_scale"), np.float32([inputs.scale]))
        stored = held.get_tensor(f"{UP}.input_zero_point")
    assert (stored.dtype, stored.tolist()) == (np.int8, [inputs.zero])
    assert inputs.zero != 0


def test_static_scales_are_those_of_the_observer(folder):
    """Of one layer, by the definition, from all that it was given."""
    made = written(folder, "static")
    plan, x = quantizers.plan(folder, "copy"), []
    with edgeq.load(folder, backend="numpy") as llm:
        windows = calibrate.cut_chunks(llm, TEXT, 32, 6)

        def watch(linear):
            def look(given):
                x.extend([np.abs(given).max()] if "blk.1.ffn_up.weight" in linear.names else [])
                return linear(given)

            return look

        with calibrate.replaced(llm.model, watch):
            for window in windows:
                llm.model.hidden(window.tolist(), llm.model.new_cache(32))
    tensor = layers(made)[f"{UP}.weight"]
    assert tensor.inputs.scale == pytest.approx(max(x) / 127, rel=1e-5)
    w = formats.dequantize(next(r.tensor for r in plan.recodings if r.tensor.name == "blk.1.ffn_up.weight"))
    np.testing.assert_allclose(tensor.parts["scale"][:, 0], np.abs(w).max(axis=1) / 127, rtol=1e-6)


@pytest.mark.parametrize("method", ["dynamic", "static", "smooth"])
def test_no_text_is_needed(folder, method):
    plan = quantizers.plan(folder, "copy")
    layerwise.apply(method, plan, Calibration(chunks=2, ctx=16, backend="numpy"))


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_backends_compute_the_same(folder, method):
    """Of rounded inputs every difference before makes some fall on the other side: as a whole they agree."""
    made = written(folder, method)
    exact, fast, base = logits(made), logits(made, "numba"), logits(folder)
    assert np.abs(fast - exact).mean() < 0.5 * np.abs(exact - base).mean()


def test_one_token_after_another_is_all_at_once(folder):
    """As there are no finer activations for few tokens."""
    model = arch.load(*files.read(written(folder, "static")), backend="numba", cache_types=("f32", "f32"))
    cache = model.new_cache(len(IDS))
    single = np.concatenate([model([token], cache) for token in IDS])
    whole = model(IDS, model.new_cache(len(IDS)), "all")
    assert np.median(np.abs(single - whole)) < 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("static", {"per": "row"}, "a scale per 'row', expected 'channel' or 'tensor'"),
        ("static", {"observer": "max"}, "unknown observer 'max'"),
        ("dynamic", {"inputs": "tensor"}, "inputs of a 'tensor'"),
        ("ternary", {"group": 40, "feedback": False}, "in groups of 40, expected whole ones"),
        ("binary", {"group": 128}, "columns in groups of 128, expected whole ones"),
    ],
)
def test_options_that_make_no_sense(folder, method, options, message):
    with pytest.raises(ValueError, match=message):
        layerwise.apply(method, quantizers.plan(folder, "copy"), QUICK, **options)


def test_what_cannot_be_quantized(folder, tmp_path):
    with pytest.raises(EdgeqError, match=r"GGUF files have no type .* name a folder instead of"):
        quantizers.quantize(folder, tmp_path / "x.gguf", "copy", method="dynamic")
    edgeq.quantize(folder, tmp_path / "q.gguf", "q8_0")
    with pytest.raises(EdgeqError, match="is q8_0 already, and would lose a second time"):
        quantizers.quantize(tmp_path / "q.gguf", tmp_path / "x", "copy", method="dynamic")


def test_command(folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["quantize", folder, tmp_path / "out", "--method", "smooth+static"]
    words += ["--calibration", tmp_path / "text.txt", "--chunks", 6, "-c", 32, "--option", "per=tensor"]
    done = CliRunner().invoke(cli.edgeq, list(map(str, words)), catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert {t.inputs.share for t in layers(tmp_path / "out").values()} == {"tensor"}
    assert CliRunner().invoke(cli.edgeq, list(map(str, words[:3]))).exit_code == 2


# ---- SmoothQuant


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("linears", [True, False])
def test_smoothing_changes_weights_and_not_the_model(name, linears, tmp_path):
    config = {"query_pre_attn_scalar": 16} if name == "gemma3" else {}
    folder = complete(name, tmp_path / "source", **config)
    plan = quantizers.plan(folder, "copy")
    smoothed = layerwise.apply("smooth", plan, QUICK, linears=linears)
    changed = {
        a.tensor.name.split(".")[2]
        for a, b in zip(plan.recodings, smoothed.recodings, strict=True)
        if a.tensor.data.tobytes() != b.tensor.data.tobytes()
    }
    of_norms = {"attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"}
    assert of_norms <= changed
    assert ({"attn_output", "ffn_down"} <= changed) == linears
    base, ours = (layerwise.model(p, "numpy") for p in (plan, smoothed))
    a, b = (m(IDS, m.new_cache(len(IDS)), "all") for m in (base, ours))
    np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())


def test_smoothing_makes_inputs_and_weights_reach_as_far():
    """Equation 4 with alpha 0.5: max|x_j| / s_j = max|w_j| s_j, the geometric mean of both."""
    x, w = np.float32([100, 1, 4, 0]), np.float32([1, 4, 0.25, 3])
    s = smooth.scale_of(x, w, 0.5)
    np.testing.assert_allclose(x[:3] / s[:3], w[:3] * s[:3], rtol=1e-6)
    np.testing.assert_allclose(s, [10, 0.5, 4, 1], rtol=1e-6)
    np.testing.assert_allclose(smooth.scale_of(x, w, 1.0)[:3], x[:3], rtol=1e-6)


def test_columns_that_one_row_makes_share_a_scale():
    np.testing.assert_array_equal(smooth.shared(np.float32([1, 5, 2, 3]), np.array([0, 1, 0, 1])), [2, 5])


def test_smoothing_helps_where_columns_reach_far(folder):
    """A model whose norms make outliers, as those of language models do."""
    plan = quantizers.plan(folder, "copy")
    recodings = []
    for r in plan.recodings:
        tensor = r.tensor
        if tensor.name.endswith("ffn_norm.weight"):
            gain = formats.dequantize(tensor).reshape(-1).copy()
            gain[::16] *= 60
            tensor = tensor._replace(format="f32", data=gain.view(np.uint8))
        elif "ffn_gate" in tensor.name or "ffn_up" in tensor.name:
            w = formats.dequantize(tensor)
            w[:, ::16] /= 60
            tensor = tensor._replace(format="f32", data=w.reshape(-1).view(np.uint8))
        recodings.append(r._replace(tensor=tensor, format=tensor.format))
    plan = plan._replace(recodings=recodings)

    def after(method):
        model = layerwise.model(layerwise.apply(method, plan, QUICK) if method else plan, "numpy")
        return model(IDS, model.new_cache(len(IDS)), "all")

    base = after(None)
    for method in ("static", "dynamic"):
        plain, smoothed = (np.abs(after(m) - base).mean() for m in (method, f"smooth+{method}"))
        assert smoothed < 0.6 * plain


# ---- few values


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), weighted=st.booleans())
def test_no_ternary_grid_has_less_error(seed, weighted):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, (3, 64)).astype(np.float32)
    h = (rng.random(64) + 0.01).astype(np.float32) if weighted else None

    def error(grid):
        left = (w - decode(encode(w, grid), grid)) ** 2 * (1 if h is None else h)
        return left.reshape(3, 2, 32).sum(axis=2)

    grid = ternary.fit(w, h, group=32)
    assert grid.scale.shape == (3, 2)
    for factor in np.linspace(0.3, 2.5, 45, dtype=np.float32):
        assert (error(grid) <= error(grid._replace(scale=grid.scale * factor)) * (1 + 1e-5)).all()


def test_ternary_by_hand():
    """Kept: 3; 3 and 2 with the mean 2.5; or all. 3², 5² / 2 and 5.5² / 3: two of them."""
    grid = ternary.fit(np.float32([[3, -2, 0.5]]), group=3)
    np.testing.assert_array_equal(grid.scale, [[2.5]])
    np.testing.assert_array_equal(ternary.fit(np.zeros((1, 4), np.float32), group=4).scale, [[0]])


@pytest.mark.parametrize("method", ["ternary", "binary"])
@pytest.mark.parametrize("feedback", [True, False])
def test_folders_of_few_values(folder, method, feedback):
    made = written(folder, method, group=32, feedback=feedback)
    for tensor in layers(made).values():
        codes, grid = formats.unpack(tensor)
        values = grid.levels[codes]
        assert (tensor.format, tensor.inputs) == ("i2", None)
        assert set(np.unique(values)) == ({-1, 0, 1} if method == "ternary" else {-1, 1})
        assert grid.scale.shape == (tensor.rows, tensor.cols // 32)
    exact, fast = logits(made), logits(made, "numba")
    np.testing.assert_allclose(fast, exact, atol=0.02 * np.abs(exact).max())


def test_the_first_matrix_is_what_the_algorithms_make_of_it(folder):
    plan = quantizers.plan(folder, "copy")
    before = next(r.tensor for r in plan.recodings if r.tensor.name == "blk.0.ffn_down.weight")
    made = layerwise.apply("ternary", plan, QUICK, group=32, feedback=False)
    after = next(r.tensor for r in made.recodings if r.tensor.name == before.name)
    w = formats.dequantize(before)
    grid = ternary.fit(w, group=32)
    np.testing.assert_array_equal(formats.dequantize(after), decode(encode(w, grid), grid))


@pytest.mark.parametrize("module", [ternary, binary])
def test_feedback_lessens_the_error_of_the_output(module):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 64)).astype(np.float32)
    x = rng.standard_normal((64, 500)) * rng.uniform(0.2, 2, (64, 1))
    x[1::2] += x[::2]
    h = x @ x.T
    target = Target("few", 32, partial(module.fit, group=32))

    def error(codes, grid):
        left = w - decode(codes, grid)
        return np.vdot(left @ h, left)

    plain = target.fit(w, None)
    assert error(*gptq(w, h, target, order="groups")) < 0.85 * error(encode(w, plain), plain)


def test_inputs_survive_a_copy(folder):
    """What is written of a folder of integers has the same inputs."""
    made = written(folder, "static")
    again = to_huggingface(made, made.parent / "again", "int8")
    np.testing.assert_array_equal(logits(again), logits(made))
    assert layers(again)[f"{UP}.weight"].inputs == layers(made)[f"{UP}.weight"].inputs != Inputs("tensor")
