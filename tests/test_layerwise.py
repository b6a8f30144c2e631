"""Algorithms on whole models: what linears are given, what becomes of the files, and that they still run."""

import json
import threading
from contextlib import suppress

import numpy as np
import pytest
from click.testing import CliRunner
from folders import GOLDEN, complete

import edgeq
from edgeq import arch, calibrate, cli, files, formats, quantizers
from edgeq.calibrate import held, replaced, walk
from edgeq.errors import EdgeqError, FormatError
from edgeq.files import imatrix as imatrix_file
from edgeq.quantizers import kept, layerwise
from edgeq.quantizers.gptq import gptq
from edgeq.quantizers.layerwise import Calibration
from edgeq.quantizers.objective import error
from edgeq.quantizers.target import target

ARCHITECTURES = ["llama", "gemma3", "qwen2", "qwen3"]
WINDOWS = np.random.default_rng(0).integers(5, 90, (5, 24))
TEXT = "the 12 cats of 345 and the dog's tail. Then they went home, all of them! " * 40
QUICK = Calibration(TEXT, chunks=6, ctx=32, backend="numpy")


@pytest.fixture
def folder(request, tmp_path):
    # GGUF files cannot state another scale than that of the heads' width
    config = {"query_pre_attn_scalar": 16} if request.param == "gemma3" else {}
    return complete(request.param, tmp_path / request.param, **config)


def full_hessians(name):
    """XXᵀ of every linear of the layers, from passes through the whole model."""
    model, found = arch.load(*files.read(GOLDEN / name), backend="numpy"), {}

    def watch(linear):
        def look(x):
            x64 = x.astype(np.float64)
            found[linear.names] = found.get(linear.names, 0) + x64.T @ x64
            return linear(x)

        return look

    with replaced(model, watch):
        for window in WINDOWS:
            model.hidden(window.tolist(), model.new_cache(len(window)))
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_inputs_of_all_linears(name, backend):
    expected = full_hessians(name)
    model = held(*files.read(GOLDEN / name), backend=backend)
    done = []
    seen = {
        linear.names: inputs for linear, inputs in walk(model, WINDOWS, progress=lambda *a: done.append(a))
    }
    assert list(seen) == [names for names in expected if names[0].startswith("blk.")]
    for names, inputs in seen.items():
        assert inputs.count == WINDOWS.size
        scale = np.diagonal(expected[names]).max()
        np.testing.assert_allclose(inputs.hessian, expected[names], atol=2e-3 * scale)
        assert (inputs.magnitudes**2 <= np.diagonal(inputs.hessian) * inputs.count * 1.001).all()
    layers = len(model.network.layers)
    assert done == [("layers", i, layers) for i in range(layers + 1)]
    assert not any(hasattr(linear, "weight") for linear in vars(model.network.layers[0]).values())


def test_what_is_done_to_weights_is_seen_behind_them():
    found, model = {}, held(*files.read(GOLDEN / "llama"), backend="numpy")
    for linear, inputs in walk(model, WINDOWS, drift=True):
        name = linear.names[0]
        found[name] = inputs.hessian, inputs.drift
        if name == "blk.0.attn_q.weight":
            linear.weight[:] = 0
    h, drift = found["blk.0.attn_q.weight"]
    assert h.any()
    assert not drift.any()
    h, drift = found["blk.0.attn_output.weight"]
    assert not h.any()
    h, drift = found["blk.1.attn_q.weight"]
    assert h.any()
    assert drift.any()


def test_drift_is_what_the_first_model_has_more():
    """With values of half the size, X̃ is 2 X behind the attention."""
    found, model = {}, held(*files.read(GOLDEN / "llama"), backend="numpy")
    for linear, inputs in walk(model, WINDOWS, drift=True):
        found[linear.names] = inputs
        for name, weight in linear.parts():
            if name == "blk.0.attn_v.weight":
                weight *= 0.5
    inputs = found["blk.0.attn_output.weight",]
    atol = 1e-4 * np.diagonal(inputs.hessian).max()
    np.testing.assert_allclose(inputs.drift, inputs.hessian, atol=atol)
    expected = full_hessians("llama")["blk.0.attn_output.weight",]
    np.testing.assert_allclose(4 * inputs.hessian, expected, atol=4 * atol)


def test_no_thread_is_left():
    before = threading.active_count()
    for _ in walk(held(*files.read(GOLDEN / "llama"), backend="numpy"), WINDOWS):
        break
    assert threading.active_count() == before
    model = held(*files.read(GOLDEN / "llama"), backend="numpy")
    passes = walk(model, WINDOWS)
    linear, _ = next(passes)
    linear.weight = linear.weight[:, 1:]
    with pytest.raises(ValueError, match="matmul"):
        next(passes)
    assert threading.active_count() == before


@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
def test_gptq_makes_files_that_run(folder, tmp_path):
    plan = quantizers.plan(folder, "q4_0", tensor_types={"attn_v": "q8_0", "ffn_up": "q4_1"})
    made = layerwise.apply("gptq", plan, QUICK, damp=0.02)
    quantizers.write(made, tmp_path / "out.gguf")
    _, tensors = files.read(tmp_path / "out.gguf")
    assert {k: t.format for k, t in tensors.items()} == {r.tensor.name: r.format for r in plan.recodings}
    with edgeq.load(tmp_path / "out.gguf", backend="numpy") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()


@pytest.mark.parametrize("folder", ["llama", "qwen3"], indirect=True)
def test_the_first_matrix_is_what_the_algorithm_makes_of_it(folder):
    """Its inputs come from passes through the whole model here."""
    plan = quantizers.plan(folder, "q4_0", tensor_types={"attn_v": "q8_0"})
    made = layerwise.apply("gptq", plan, QUICK, damp=0.02, order=None)
    [(before, after)] = [
        (p.tensor, m.tensor)
        for p, m in zip(plan.recodings, made.recodings, strict=True)
        if p.tensor.name == "blk.0.attn_v.weight"
    ]
    model, h = arch.load(*files.read(folder), backend="numpy"), []

    def watch(linear):
        def look(x):
            if "blk.0.attn_v.weight" in linear.names:
                h.append(x.T.astype(np.float64) @ x)
            return linear(x)

        return look

    with edgeq.load(folder, backend="numpy") as llm, replaced(model, watch):
        for window in calibrate.cut_chunks(llm, TEXT, 32, 6):
            model.hidden(window.tolist(), model.new_cache(32))
    w, whole = formats.dequantize(before), np.sum(h, axis=0)
    codes, grid = gptq(w, whole, target("q8_0", w.shape[1]), damp=0.02)
    ours, theirs = formats.dequantize(after), formats.dequantize(formats.pack("q8_0", codes, grid))
    assert (ours != theirs).mean() < 0.02  # another order of additions, and sometimes another code
    assert error(w, ours, whole) == pytest.approx(error(w, theirs, whole), rel=0.02)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_folder_and_its_gguf_file_become_the_same(folder, tmp_path):
    edgeq.quantize(folder, tmp_path / "f32.gguf", "f32")
    for method in ("gptq", "awq", "awq+gptq", "hqq"):
        data = []
        for source in (folder, tmp_path / "f32.gguf"):
            plan = layerwise.apply(method, quantizers.plan(source, "q4_1"), QUICK)
            quantizers.write(plan, tmp_path / "out.gguf")
            data.append({k: t.data.tobytes() for k, t in files.read(tmp_path / "out.gguf")[1].items()})
        assert data[0] == data[1], method


@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
def test_awq_changes_weights_and_not_the_model(folder, tmp_path):
    plan = quantizers.plan(folder, "q4_0")
    scaled = layerwise.apply("awq", plan, QUICK, clipping=False)
    before = {r.tensor.name: formats.dequantize(r.tensor) for r in plan.recodings}
    kept = scaled._replace(recodings=[r._replace(format=r.tensor.format) for r in scaled.recodings])
    quantizers.write(kept, tmp_path / "scaled.gguf")
    changed = [
        r.tensor.name
        for r in scaled.recodings
        if not np.array_equal(formats.dequantize(r.tensor), before[r.tensor.name])
    ]
    for r in plan.recodings:  # matrices whose rows are whole blocks, and what makes their inputs
        layer, _, kind = r.tensor.name.removesuffix(".weight").rpartition(".")
        if kind in layerwise.MAKERS and r.format == "q4_0":
            assert {r.tensor.name, f"{layer}.{layerwise.MAKERS[kind]}.weight"} <= set(changed)
    ids = WINDOWS[0].tolist()
    with edgeq.load(folder, backend="numpy") as a, edgeq.load(tmp_path / "scaled.gguf", backend="numpy") as b:
        theirs, ours = a.logits(ids), b.logits(ids)
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_hqq_leaves_formats_without_offsets(folder):
    plan = quantizers.plan(folder, "q4_0", tensor_types={"ffn_up": "q4_1"})
    made = layerwise.apply("hqq", plan, Calibration())
    changed = {
        r.tensor.name.split(".")[2] for r, p in zip(made.recodings, plan.recodings, strict=True) if r != p
    }
    assert changed == {"ffn_up"}


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_cannot_be_done(folder):
    plan = quantizers.plan(folder, "q4_0")
    with pytest.raises(ValueError, match="unknown method 'mix'; edgeq has rtn, gptq, hqq, awq"):
        layerwise.apply("awq+mix", plan, QUICK)
    with pytest.raises(ValueError, match="awq has no option sweeps; it has clipping, damp, feedback"):
        layerwise.apply("awq", plan, QUICK, sweeps=1)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_text_that_the_model_makes_up(folder):
    plan = quantizers.plan(folder, "q4_0")
    made = [
        layerwise.apply("gptq", plan, Calibration(chunks=3, ctx=16, seed=seed, backend="numpy"))
        for seed in (0, 0, 1)
    ]
    a, b, c = ([r.tensor.data.tobytes() for r in m.recodings] for m in made)
    assert a == b
    assert a != c


def test_made_up_texts_are_as_likely_as_the_model_says():
    """The second token of 4,000 short texts against the probabilities after the first."""
    model = arch.load(*files.read(GOLDEN / "llama"), backend="numpy")
    windows = calibrate.sampled(model, 4000, 2, first=7, seed=0)
    logits = model([7], model.new_cache(2))[0].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counts = np.bincount(windows[:, 1], minlength=len(p))
    assert (windows[:, 0] == 7).all()
    assert (np.abs(counts - 4000 * p) < 6 * np.sqrt(4000 * p * (1 - p)) + 1).all()
    assert len(set(calibrate.sampled(model, 50, 2, first=None, seed=0)[:, 0].tolist())) > 10


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_gptq_with_importance_for_what_it_leaves(folder, tmp_path):
    """The matrices of the layers are gptq's; the imatrix weighs what is left."""
    with edgeq.load(folder, backend="numpy") as llm:
        imatrix_file.write(tmp_path / "imatrix.gguf", edgeq.imatrix(llm, TEXT, ctx=32, chunks=4, output=True))
    plain = layerwise.apply("gptq", quantizers.plan(folder, "q4_0"), QUICK)
    weighed = quantizers.plan(folder, "q4_0", imatrix=tmp_path / "imatrix.gguf", tensor_types={"": "q4_0"})
    same = layerwise.apply("gptq", weighed, QUICK)
    for a, b in zip(plain.recodings, same.recodings, strict=True):
        if a.tensor.name.startswith("blk.") and a.format == b.format:
            np.testing.assert_array_equal(a.tensor.data, b.tensor.data)
    quantizers.write(same, tmp_path / "out.gguf")


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_command(folder, tmp_path):
    def run(*words):
        words = ["quantize", folder, tmp_path / "out.gguf", "q4_1", *words]
        return CliRunner().invoke(cli.edgeq, list(map(str, words)), catch_exceptions=False)

    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--calibration", tmp_path / "text.txt", "--chunks", 6, "-c", 32]
    options = ["--option", "damp=0.05", "--option", "order=groups", "--report", tmp_path / "report.json"]
    done = run("--method", "gptq", *given, *options)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out.gguf'}\n")
    _, tensors = files.read(tmp_path / "out.gguf")
    errors = json.loads((tmp_path / "report.json").read_text())["errors"]
    assert set(errors) == {k for k, t in tensors.items() if k.startswith("blk.") and t.format == "q4_1"}
    assert all(0 < e < 0.1 for e in errors.values())
    again = Calibration(TEXT, 6, 32)
    options = {"damp": 0.05, "order": "groups"}
    edgeq.quantize(
        folder, tmp_path / "b.gguf", "q4_1", method="gptq", method_options=options, calibration=again
    )
    for name, tensor in files.read(tmp_path / "b.gguf")[1].items():
        np.testing.assert_array_equal(tensor.data, tensors[name].data)
    assert run("--method", "gptq", *given, "--option", "dump=1").exit_code == 2
    assert run("--method", "gptq", *given, "--option", "damp").exit_code == 2
    assert run("--method", "magic").exit_code == 2


class Enough(Exception):
    """The run was interrupted."""


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize("after", [0, 2, 5])
@pytest.mark.parametrize(
    ("method", "type", "options"),
    [
        ("gptq", "q4_0", {}),
        ("gptq", "q4_0", {"asymmetric": 0.5}),
        ("awq+gptq", "q4_0", {}),
        ("gptq", "i4-g32-asym", {}),
        ("aqlm", "copy", {"bits": 4, "rounds": 1, "beam": 2}),
    ],
)
def test_an_interrupted_method_goes_on_to_the_bit(
    folder, tmp_path, monkeypatch, method, type, options, after
):
    plan, keep = quantizers.plan(folder, type), tmp_path / "keep"
    seen, add, looks, writes = calibrate._seen, kept.Kept.add, [], []

    def look(streams):
        looks.append(0)
        return seen(streams)

    def fail(self, *args):
        add(self, *args)
        writes.append(0)
        if len(writes) > after:
            raise Enough

    monkeypatch.setattr(calibrate, "_seen", look)
    errors, again = {}, {}
    whole = layerwise.apply(method, plan, QUICK, found=errors.__setitem__, **options)
    all_looks = len(looks)
    with monkeypatch.context() as patch, suppress(Enough):
        patch.setattr(kept.Kept, "add", fail)
        layerwise.apply(method, plan, QUICK, found=lambda *lost: None, keep=keep, **options)
    assert len(looks) < 2 * all_looks
    looks.clear()
    resumed = layerwise.apply(method, plan, QUICK, found=again.__setitem__, keep=keep, **options)
    assert len(looks) <= all_looks - (after > 0)
    for a, b in zip(whole.recodings, resumed.recodings, strict=True):
        assert (a.tensor.name, a.format, a.tensor.format) == (b.tensor.name, b.format, b.tensor.format)
        assert a.tensor.data.tobytes() == b.tensor.data.tobytes()
        assert {key: part.tobytes() for key, part in a.tensor.parts.items()} == {
            key: part.tobytes() for key, part in b.tensor.parts.items()
        }
    assert errors == again


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_is_kept_of_another_run_is_refused(folder, tmp_path):
    plan, keep, mine = quantizers.plan(folder, "q4_0"), tmp_path / "keep", tmp_path / "mine"
    layerwise.apply("gptq", plan, QUICK, keep=keep)
    with pytest.raises(EdgeqError, match="another options"):
        layerwise.apply("gptq", plan, QUICK, keep=keep, damp=0.1)
    with pytest.raises(EdgeqError, match="another report"):  # the errors of what was made are not known
        layerwise.apply("gptq", plan, QUICK, found=lambda *lost: None, keep=keep)
    with pytest.raises(EdgeqError, match="another model or type"):
        layerwise.apply("gptq", quantizers.plan(folder, "q4_1"), QUICK, keep=keep)
    told = keep / "gptq" / "0" / kept.TENSORS
    told.write_text(told.read_text().replace('"q4_0"', '"q4_1"'))
    with pytest.raises(FormatError, match="begin anew"):
        layerwise.apply("gptq", plan, QUICK, keep=keep)
    mine.mkdir()
    (mine / "letter.txt").write_text("Dear")
    with pytest.raises(EdgeqError, match="something else"):
        layerwise.apply("gptq", plan, QUICK, keep=mine)
    quantizers.discard(mine)
    assert (mine / "letter.txt").exists()
    with pytest.raises(EdgeqError, match="is no folder"):
        layerwise.apply("gptq", plan, QUICK, keep=tmp_path / "none" / "keep")


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_is_kept_lies_beside_a_folder(folder, tmp_path):
    words = ["quantize", str(folder), f"{tmp_path / 'made'}/", "i4-g32-asym", "--method", "gptq"]
    done = CliRunner().invoke(cli.edgeq, [*words, "--chunks", "2", "-c", "32"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "made" / "config.json").exists()
    assert not (tmp_path / "made.made").exists()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_quantize_resumes(folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    add = kept.Kept.add

    def interrupt(self, *args):
        add(self, *args)
        raise KeyboardInterrupt

    def quantize(name, *more):
        words = ["quantize", str(folder), str(tmp_path / name), "q4_0", "--method", "gptq", "--chunks", "6"]
        return CliRunner().invoke(cli.edgeq, [*words, "-c", "32", "--calibration", str(text), *more])

    planned = (
        CliRunner().invoke(cli.edgeq, ["quantize", str(folder), "q4_0", "--dry-run"]).stdout.splitlines()[-1]
    )
    whole = quantize("whole.gguf")
    assert whole.exit_code == 0
    assert planned in whole.output  # its sizes are those before the method
    with monkeypatch.context() as patch:
        patch.setattr(kept.Kept, "add", interrupt)
        stopped = quantize("parts.gguf")
    assert stopped.exit_code
    assert "--resume goes on" in stopped.output
    assert quantize("parts.gguf", "--resume").exit_code == 0
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "parts.gguf.made").exists()
