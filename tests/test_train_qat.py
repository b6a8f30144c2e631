"""Quantization-aware training: what is trained is what is stored, and it recovers what rounding loses."""

import numpy as np
import pytest
from click.testing import CliRunner
from folders import GOLDEN, complete

from edgeq import EdgeqError, arch, cli, files, formats, quantizers, tokenizer
from edgeq.arch import huggingface
from edgeq.inputs import Inputs
from edgeq.train import data, qat, run, tape
from edgeq.train.backend import Network
from edgeq.train.data import Batch, Example, Order
from edgeq.train.loop import Loop, Options
from edgeq.train.tape import Var

RNG = np.random.default_rng(0)


def layers(name):
    return name.startswith("blk.")


def network(name="mistral", **options):
    return Network(*files.read(GOLDEN / name), GOLDEN / name, trained=layers, **options)


def ids_of(name):
    return np.load(GOLDEN / name / "golden.npz")["ids"].astype(np.int64)


def train(net, learned, folder, *, steps, rate=0.005, name="mistral", **options):
    example = Example(ids_of(name), np.arange(48) > 0)
    loop = Loop(net, learned, Order([example], 1, 0), Options(steps=steps, rate=rate), folder, **options)
    folder.mkdir(exist_ok=True)
    loop.run()
    return [point.loss for point in loop.curve]


@pytest.mark.parametrize("lsq", [False, True])
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "i8", "i4", "ternary", "binary", "q4_1"])
def test_the_exported_tensors_compute_what_was_trained(format, lsq, tmp_path):
    net = network()
    if lsq and format in ("binary", "q4_1"):
        with pytest.raises(ValueError, match="cannot learn"):
            qat.attach(net, format, steps=True)
        return
    learned = net.parameters | qat.attach(net, format, steps=lsq)
    losses = train(net, learned, tmp_path, steps=8)
    assert losses[-1] < losses[0]
    ids = ids_of("mistral")
    trained = tape.value(net.head(net.hidden(ids[None])))
    meta, tensors = files.read(GOLDEN / "mistral")
    module, meta, tensors = arch.identify(meta, tensors, "model")
    made = qat.exported(net)
    assert {t.format for n, t in made.items() if len(t.shape) == 2} == {format}
    config = files.read(GOLDEN / "mistral")[0]
    names = {huggingface.gguf_name(n, {v: k for k, v in module.HF_NAMES.items()}): n for n in _hf_names()}
    stored = {names[n]: made.get(n, t) for n, t in tensors.items()}
    for backend, most in (("numpy", 1e-5), ("numba", 0.02)):  # inputs of 8 bits, a float16 cache
        model = arch.load(config, stored, backend=backend)
        error = model(ids, model.new_cache(48), "all") - trained
        assert np.linalg.norm(error) < most * np.linalg.norm(trained)


def _hf_names():
    return files.read(GOLDEN / "mistral")[1]


@pytest.mark.parametrize("format", [n for n in formats.names() if hasattr(formats.get(n), "pack")])
def test_what_computes_is_what_is_packed(format):
    w = RNG.normal(size=(4, 512)).astype(np.float32)
    fake = qat.Fake([Var(w)], format, qat.nearest, False)
    assert np.array_equal(tape.value(fake.decoded(0)), formats.dequantize(fake.encoded(0)))


def test_gradients_pass_the_rounding_unchanged():
    w = Var(RNG.standard_normal((4, 32)).astype("f4"))
    fake = qat.Fake([w], "q4_0", formats.choose, False)
    x, g = RNG.standard_normal((3, 32)).astype("f4"), RNG.standard_normal((3, 4)).astype("f4")
    tape.backward(fake(x), g)
    np.testing.assert_allclose(w.grad, g.T @ x, rtol=1e-6)
    stored = formats.dequantize(formats.quantize("q4_0", w.value))
    np.testing.assert_allclose(tape.value(fake(x)), x @ stored.T, rtol=1e-6)


def test_learned_steps_have_the_gradients_of_the_paper():
    """LSQ (arXiv 1902.08153), equations 1 to 3 and section 2.2, element by element."""
    levels = np.arange(-2, 2, dtype=np.int8)
    w, s, g = RNG.standard_normal((3, 8)), np.array([[0.3], [0.5], [2.0]]), RNG.standard_normal((3, 8))
    rounded = np.clip(np.rint(w / s), -2, 1)
    weights, step = Var(w.astype("f4")), Var(s.astype("f4"))
    tape.backward(qat.learned_step(weights, step, (rounded * s).astype("f4"), levels), g.astype("f4"))
    for i in range(3):
        total = 0.0
        for j in range(8):
            q = w[i, j] / s[i, 0]
            if q <= -2 or q >= 1:
                slope = -2 if q <= -2 else 1
                assert weights.grad[i, j] == 0
            else:
                slope = rounded[i, j] - q
                assert weights.grad[i, j] == pytest.approx(g[i, j])
            total += g[i, j] * slope
        assert step.grad[i, 0] == pytest.approx(total / np.sqrt(8 * 1), rel=1e-4)


def test_the_scale_of_bitnet_is_the_mean_magnitude():
    w = RNG.standard_normal((2, 512)).astype("f4")
    stored = formats.quantize("tq2_0", w, choose=qat.mean)
    scale = np.abs(w.reshape(4, 256)).mean(axis=1, keepdims=True)
    expected = np.clip(np.rint(w.reshape(4, 256) / scale.astype("f2")), -1, 1) * scale.astype("f2")
    np.testing.assert_allclose(formats.dequantize(stored), expected.reshape(2, 512), rtol=1e-3)
    rows = formats.quantize("ternary", w, choose=qat.mean)
    np.testing.assert_array_equal(rows.data, formats.quantize("ternary", w).data)


def test_rounded_inputs_have_eight_bits():
    x = Var(RNG.standard_normal((3, 50)).astype("f4"))
    y = qat.rounded(x)
    scale = np.abs(x.value).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(y.value / scale, np.rint(x.value / scale), atol=1e-4)
    tape.backward(y, np.full((3, 50), 2, "f4"))
    assert (x.grad == 2).all()
    assert (tape.value(qat.rounded(np.zeros((1, 4), "f4"))) == 0).all()


@pytest.mark.parametrize("format", ["ternary", "binary"])
def test_training_recovers_what_rounding_loses(format, tmp_path):
    net = network()
    qat.attach(net, format, activations=True)
    losses = train(net, net.parameters, tmp_path, steps=40, rate=0.01)
    assert losses[-1] < 0.5 * losses[0]


def test_a_student_learns_what_its_teacher_says(tmp_path):
    net = network()
    learned = net.parameters | qat.attach(net, "q4_0")
    teacher = qat.Teacher(network())
    losses = train(net, learned, tmp_path, steps=30, begin=lambda s, t, b: teacher.begin(b), loss=teacher)
    assert losses[-1] < 0.3 * losses[0]
    batch = Batch(*(ids_of("mistral")[None, a:b] for a, b in ((0, 47), (1, 48))), np.ones((1, 47), bool))
    teacher.begin(batch)
    rows = np.arange(47)
    same = teacher(teacher.network.head(teacher.hidden), rows, np.ones(47, "f4"), rows)
    assert same == pytest.approx(0, abs=1e-4)


def test_from_files_to_a_file(tmp_path):
    folder = complete("llama", tmp_path / "model")
    text = tmp_path / "data.txt"
    text.write_text("the the 12 " * 60)
    asked = ["train", "qat", str(folder), "Q4_0", "-d", str(text), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.edgeq, [*asked, "--steps", "12", "--lr", "0.01", "--length", "40"])
    assert result.exit_code == 0, result.output
    losses = np.loadtxt(tmp_path / "out" / "loss.csv", delimiter=",", skiprows=1)[:, 1]
    assert losses[-1] < losses[0]
    meta, tensors = files.read(tmp_path / "out" / "model.gguf")
    assert {t.format for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2} == {"q4_0"}
    model = arch.load(meta, tensors, backend="numpy")
    network = Network(*files.read(folder), folder, trained=layers)
    qat.attach(network, "q4_0")
    order = Order(data.read(text, tokenizer.load(folder), None, 40), 1, 0)
    loop = Loop(network, network.parameters, order, Options(steps=12, rate=0.01), tmp_path / "out")
    assert loop.resume()
    ids = ids_of("llama")
    trained = tape.value(network.head(network.hidden(ids[None])))
    np.testing.assert_allclose(model(ids, model.new_cache(48), "all"), trained, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="nf4 is neither a type of GGUF's nor one of i8"):
        run.train_quantized(folder, "nf4", text, tmp_path / "other")
    with pytest.raises(ValueError, match="are for ternary types, not for q4_0"):
        run.train_quantized(folder, "q4_0", text, tmp_path / "other", mean=True)


@pytest.mark.parametrize("format", run.INTEGERS)
def test_from_files_to_a_folder_of_integers(format, tmp_path):
    folder, text, out = complete("llama", tmp_path / "llama"), tmp_path / "data.txt", tmp_path / "out"
    text.write_text("the the 12 " * 60)
    how = dict(activations=True, length=40, steps=3, rate=0.01)
    assert run.train_quantized(folder, format, text, out, **how).path == out / "model"
    network = Network(*files.read(folder), folder, trained=layers)
    qat.attach(network, format, activations=True)
    order = Order(data.read(text, tokenizer.load(folder), None, 40), 1, 0)
    assert Loop(network, network.parameters, order, Options(steps=3, rate=0.01), out).resume()
    ids = ids_of("llama")
    trained = tape.value(network.head(network.hidden(ids[None])))
    meta, tensors = files.read(out / "model")
    assert {t.inputs for t in tensors.values() if t.parts} == {Inputs("token")}
    for backend in ("numpy", "numba"):
        model = arch.load(meta, tensors, backend=backend, cache_types=("f32", "f32"))
        error = model(ids, model.new_cache(48), "all") - trained
        assert np.linalg.norm(error) < 0.01 * np.linalg.norm(trained)  # a few inputs get the next code
    run.train_quantized(folder, format, text, out, resume=True, **how)  # nothing is left to do


def test_what_is_quantized_beside_integers_becomes_floats(tmp_path):
    source, text = tmp_path / "model.gguf", tmp_path / "data.txt"
    quantizers.quantize(complete("llama", tmp_path / "llama"), source, "q8_0")
    text.write_text("the the 12 " * 60)
    made = run.train_quantized(source, "ternary", text, tmp_path / "out", length=40, steps=1).path
    before, after = files.read(source)[1]["token_embd.weight"], files.read(made)[1]
    embedding = after["model.embed_tokens.weight"]
    assert (before.format, embedding.format) == ("q8_0", "f16")
    np.testing.assert_allclose(formats.dequantize(embedding), formats.dequantize(before), rtol=2**-11)


def test_columns_that_no_folder_takes_are_refused_at_once(stories260k, tmp_path):
    text = tmp_path / "data.txt"
    text.write_text("Once upon a time " * 60)
    with pytest.raises(EdgeqError, match="ffn_down.weight has 172 columns, and folders take multiples of 32"):
        run.train_quantized(stories260k, "i4", text, tmp_path / "out", length=40)
    assert not list((tmp_path / "out").iterdir())
