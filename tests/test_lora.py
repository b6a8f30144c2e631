"""Adapters: PEFT's logits with those that it trained (see tools/make_lora_goldens.py), its files with those
that edgeq writes, merged models that answer as the adapters did.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from folders import GOLDEN, complete

import edgeq
from edgeq import arch, cli, files, quantizers
from edgeq.errors import EdgeqError, FormatError
from edgeq.train import adapter, applied, lora, merge
from edgeq.train.backend import Network
from edgeq.train.loop import gradients
from edgeq.train.run import train_lora

LORA = Path(__file__).parent / "golden" / "lora"
TINY = sorted(p.name for p in LORA.iterdir())
BACKENDS = {"numpy": 1e-4, "numba": 3e-2}  # largest difference of a logit; the fast path's cache is float16


def golden(name):
    """Ids, and PEFT's logits."""
    return np.load(GOLDEN / name / "golden.npz")["ids"], np.load(LORA / name / "logits.npy")


def load(path, backend="numpy"):
    return arch.load(*files.read(path), backend=backend, path=path)


def logits(model, ids):
    return model(ids, model.new_cache(len(ids)), "all")


def read(name, path=None):
    network = Network(*files.read(GOLDEN / name), GOLDEN / name)
    return network, adapter.read(path or LORA / name, network.module, network.config)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_peft_give_its_logits(name, backend):
    ids, expected = golden(name)
    model = load(GOLDEN / name, backend)
    applied.load(model, LORA / name)
    np.testing.assert_allclose(logits(model, ids), expected, atol=BACKENDS[backend], rtol=0)
    cache = model.new_cache(64)
    one_by_one = np.concatenate([model([i], cache) for i in ids])
    np.testing.assert_allclose(one_by_one, expected, atol=BACKENDS[backend], rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_adapters_come_and_go_and_add_up(name):
    ids, expected = golden(name)
    model = load(GOLDEN / name)
    without = logits(model, ids)
    applied.load(model, [(LORA / name, 0.25), (LORA / name, 0.75)])
    np.testing.assert_allclose(logits(model, ids), expected, atol=1e-4, rtol=0)
    applied.load(model, (LORA / name, 0.0))
    np.testing.assert_array_equal(logits(model, ids), without)
    applied.load(model, LORA / name)
    applied.load(model, [])
    np.testing.assert_array_equal(logits(model, ids), without)


@pytest.mark.parametrize("name", TINY)
def test_what_trains_computes_the_same(name):
    ids, expected = golden(name)
    network, found = read(name)
    lora.put(network, found)
    np.testing.assert_allclose(network.head(network.hidden(ids[None])), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [n for n in TINY if n != "qwen3"])  # which has several ranks
def test_folders_are_as_peft_writes_them(name, tmp_path):
    network, found = read(name)
    raw = json.loads((LORA / name / adapter.CONFIG).read_text())
    settings = lora.Settings(
        r=raw["r"], lora_alpha=raw["lora_alpha"], use_rslora=raw["use_rslora"], bias=raw["bias"]
    )
    adapter.write_peft(tmp_path, found, settings, network.module, network.config, "base")
    ours = safetensors.numpy.load_file(tmp_path / adapter.WEIGHTS)
    theirs = safetensors.numpy.load_file(LORA / name / adapter.WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array)
    wrote = json.loads((tmp_path / adapter.CONFIG).read_text())
    assert wrote.keys() <= raw.keys()
    wrote["base_model_name_or_path"] = raw["base_model_name_or_path"]
    wrote["target_modules"], raw["target_modules"] = set(wrote["target_modules"]), set(raw["target_modules"])
    assert wrote == {key: raw[key] for key in wrote}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gguf_adapters_of_gguf_models(name, tmp_path):
    ids, expected = golden(name)
    folder = complete(name, tmp_path / "model")
    quantizers.quantize(folder, tmp_path / "model.gguf", "f32")
    merge.convert(folder, LORA / name, tmp_path / "adapter.gguf")
    for base in (folder, tmp_path / "model.gguf"):
        for path in (LORA / name, tmp_path / "adapter.gguf"):
            model = load(base)
            applied.load(model, path)
            np.testing.assert_allclose(logits(model, ids), expected, atol=1e-4, rtol=0)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    assert len(shapes) == 2 * len(read(name)[1].pairs)
    tensors = {t.name: t.shape for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for key, shape in shapes.items():  # as llama.cpp demands them, innermost first
        base, side = key.rsplit(".", 1)
        assert shape[0 if side == "lora_a" else 1] == tensors[base][0 if side == "lora_a" else 1]


def test_a_gguf_adapter_becomes_a_folder_again(tmp_path):
    merge.convert(complete("llama", tmp_path / "model"), LORA / "llama", tmp_path / "adapter.gguf")
    merge.convert(GOLDEN / "llama", tmp_path / "adapter.gguf", tmp_path / "peft")
    ours = safetensors.numpy.load_file(tmp_path / "peft" / adapter.WEIGHTS)
    for key, array in safetensors.numpy.load_file(LORA / "llama" / adapter.WEIGHTS).items():
        np.testing.assert_array_equal(ours[key], array)
    with pytest.raises(EdgeqError, match="differ in rank"):
        merge.convert(GOLDEN / "qwen3", _gguf_of("qwen3", tmp_path), tmp_path / "other")


def _gguf_of(name, tmp_path):
    path = tmp_path / f"{name}.gguf"
    merge.convert(GOLDEN / name, LORA / name, path)
    return path


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3"])
def test_merged_models_answer_as_the_adapter_did(name, tmp_path):
    ids, expected = golden(name)
    folder = complete(name, tmp_path / "model")
    merge.merge(folder, [(LORA / name, 1.0)], tmp_path / "merged.gguf")
    np.testing.assert_allclose(logits(load(tmp_path / "merged.gguf"), ids), expected, atol=1e-4, rtol=0)
    quantizers.quantize(folder, tmp_path / "model.gguf", "f16")
    merge.merge(
        tmp_path / "model.gguf", [(LORA / name, 0.5), (LORA / name, 0.5)], tmp_path / "again.gguf", type="f32"
    )
    tensors = files.read(tmp_path / "again.gguf")[1]
    assert {tensors[n].format for n in read(name)[1].pairs} == {"f32"}
    np.testing.assert_allclose(logits(load(tmp_path / "again.gguf"), ids), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("targets", [("q_proj", "ffn_up"), ("all-linear",)])
@pytest.mark.parametrize("name", ["llama-biases", "gemma3"])
def test_an_adapter_begins_as_nothing_and_only_it_learns(name, targets):
    ids = np.load(GOLDEN / name / "golden.npz")["ids"]
    network = Network(*files.read(GOLDEN / name), GOLDEN / name)
    before = network.head(network.hidden(ids[None]))
    settings = lora.Settings(r=2, target_modules=targets, bias="lora_only")
    learned, _ = lora.attach(network, settings, 0)
    np.testing.assert_array_equal(before, network.head(network.hidden(ids[None])).value)
    kinds = {n.split(".")[2] for n in learned if n.startswith("blk.") and n.endswith("lora_a")}
    both = {"attn_q", "ffn_up"}
    all_of_them = both | {"attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down"}
    assert kinds == (both if targets[0] == "q_proj" else all_of_them)
    biased = {n.split(".")[2] for n in learned if n.endswith("bias")}
    assert biased == (kinds if name == "llama-biases" else set())


def test_biases_that_learn():
    network = Network(*files.read(GOLDEN / "qwen2"), GOLDEN / "qwen2")
    learned, _ = lora.attach(network, lora.Settings(r=2, target_modules=("q_proj",), bias="all"), 0)
    assert {n.split(".")[2] for n in learned if n.endswith("bias")} == {"attn_q", "attn_k", "attn_v"}
    assert not lora.attach(network, lora.Settings(r=2), 0)[0].keys() & {"blk.0.attn_q.bias"}


def test_rslora_counts_by_the_root_of_the_rank():
    assert lora.Settings(r=16, lora_alpha=8).scale == 0.5
    assert lora.Settings(r=16, lora_alpha=8, use_rslora=True).scale == 2


def test_dropout_is_a_matter_of_the_step():
    drop, x = lora.Dropout(0.5, seed=1), np.ones((40, 50), np.float32)
    assert drop(x, 0) is x
    drop.key = (3, 0)
    first = drop(x, 0)
    assert set(np.unique(first)) == {0, 2}
    assert first.mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(first, drop(x, 0))
    assert (drop(x, 1) != first).any()
    drop.key = (4, 0)
    assert (drop(x, 0) != first).any()


def test_a_target_that_names_nothing_is_an_error():
    network = Network(*files.read(GOLDEN / "llama"), GOLDEN / "llama")
    with pytest.raises(ValueError, match="no matrix is named 'query'; the model has .*q_proj"):
        lora.attach(network, lora.Settings(target_modules=("query",)), 0)


def changed(tmp_path, **config):
    folder = tmp_path / "adapter"
    shutil.copytree(LORA / "llama", folder, dirs_exist_ok=True)
    raw = json.loads((folder / adapter.CONFIG).read_text()) | config
    (folder / adapter.CONFIG).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "found 'IA3', expected LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 5}, "found 5, expected 4"),
        ({"lora_alpha": "big"}, "expected a positive number"),
    ],
)
def test_folders_that_are_no_plain_lora(tmp_path, config, message):
    with pytest.raises(FormatError, match=message):
        read("llama", changed(tmp_path, **config))


def test_an_adapter_of_another_model_changes_nothing(tmp_path):
    model = load(GOLDEN / "llama-3")
    with pytest.raises(FormatError, match="adapter for another model"):
        applied.load(model, LORA / "llama")
    assert not any(isinstance(f, applied.Adapted) for f in vars(model.network.layers[0]).values())
    with pytest.raises(FormatError, match="general.architecture"):
        read("llama", _gguf_of("qwen3", tmp_path))
    quantizers.quantize(complete("llama", tmp_path / "model"), tmp_path / "model.gguf", "f32")
    with pytest.raises(FormatError, match="expected 'adapter'"):
        read("llama", tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"no adapter_config\.json"):
        read("llama", tmp_path)
    with pytest.raises(EdgeqError, match="no biases"):
        merge.convert(GOLDEN / "qwen2", LORA / "qwen2", tmp_path / "x.gguf")


def examples(tmp_path):
    path = tmp_path / "data.jsonl"
    entries = [{"prompt": f"{i}", "completion": " the'the'"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_training_from_the_command_line_to_answers(tmp_path):
    model, out = complete("qwen3", tmp_path / "model"), tmp_path / "out"
    arguments = ["train", "lora", str(model), "-d", str(examples(tmp_path)), "-o", str(out), "--lr", "0.02"]
    arguments += [
        "--steps",
        "30",
        "--save-every",
        "20",
        "-b",
        "4",
        "--targets",
        "all-linear",
        "--dropout",
        "0.1",
    ]
    result = CliRunner().invoke(cli.edgeq, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert "30 steps" in result.stderr
    losses = np.loadtxt(out / "loss.csv", delimiter=",", skiprows=1)[:, 1]
    assert losses[-1] < 0.5 * losses[0]
    again = CliRunner().invoke(cli.edgeq, arguments)
    assert again.exit_code == 1
    assert "--resume" in str(again.exception)
    assert CliRunner().invoke(cli.edgeq, [*arguments, "--resume"]).exit_code == 0

    prompt = ["run", str(model), "3", "--raw", "--temp", "0", "-n", "6", "--backend", "numpy"]
    with_it = CliRunner().invoke(cli.edgeq, [*prompt, "--lora", str(out)])
    assert with_it.stdout.strip().startswith("the'the"), with_it.output
    assert "the'the" not in CliRunner().invoke(cli.edgeq, [*prompt, "--lora", f"{out}:0"]).stdout
    merged = str(tmp_path / "merged.gguf")
    result = CliRunner().invoke(cli.edgeq, ["lora", "merge", str(model), str(out), "-o", merged])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(cli.edgeq, [prompt[0], merged, *prompt[2:]]).stdout == with_it.stdout


def test_an_llm_changes_adapters(tmp_path):
    folder = complete("llama", tmp_path / "model")
    ids, expected = golden("llama")
    with edgeq.load(folder, backend="numpy", lora=LORA / "llama") as llm:
        np.testing.assert_allclose(llm.logits(ids), expected, atol=1e-4)
        adapted = llm.generate(ids.tolist(), max_tokens=8, temperature=0)
        llm.use_lora([])
        plain = llm.generate(ids.tolist(), max_tokens=8, temperature=0)
        llm.use_lora([(LORA / "llama", 1.0)])
        assert llm.generate(ids.tolist(), max_tokens=8, temperature=0) == adapted != plain


def test_an_adapter_gives_back_what_two_bits_lost(tmp_path):
    """HQQ+: an HQQ base, and beside it an adapter that learns what the model said before."""
    model, base, out = complete("mistral", tmp_path / "model"), tmp_path / "base", tmp_path / "out"
    result = CliRunner().invoke(
        cli.edgeq, ["quantize", str(model), str(base), "i2-g32-asym", "--method", "hqq"]
    )
    assert result.exit_code == 0, result.output
    kinds = {t.format for n, t in files.read(base)[1].items() if n.endswith("proj.weight")}
    assert kinds == {"i2"}
    text = tmp_path / "data.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(33, 127, 800))))
    learn = ["train", "lora", str(base), "-d", str(text), "-o", str(out), "--teacher", str(model), "-r", "32"]
    learn += ["--targets", "all-linear", "--lr", "0.005", "--steps", "60", "--length", "40", "-b", "2"]
    result = CliRunner().invoke(cli.edgeq, learn)
    assert result.exit_code == 0, result.output
    ids = np.random.default_rng(1).integers(6, 98, 48)
    whole, rounded, corrected = load(model), load(base), load(base)
    applied.load(corrected, out)
    wanted = logits(whole, ids)
    lost, left = (np.linalg.norm(logits(m, ids) - wanted) for m in (rounded, corrected))
    assert left < 0.9 * lost


def test_the_base_is_never_written(tmp_path):
    folder = complete("llama", tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    train_lora(folder, examples(tmp_path), tmp_path / "out", steps=2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("format", ["q4_0", "tq2_0", "q8_0", "nf4"])
def test_a_quantized_base_learns_as_its_decoded_weights_do(format, tmp_path):
    """QLoRA: gradients go through the weights that the file holds, decoded where they are used."""
    from edgeq import formats
    from edgeq.train.data import Batch

    meta, tensors = files.read(GOLDEN / "mistral")
    meta = {**meta, "config": meta["config"] | {"intermediate_size": 256, "hidden_size": 256, "head_dim": 64}}
    rng, made = np.random.default_rng(0), {}
    for name, t in tensors.items():
        cols = 256 if t.cols in (64, *{meta["config"]["hidden_size"]}) or len(t.shape) == 1 else t.cols
        rows = {"q_proj": 256, "k_proj": 64, "v_proj": 64, "o_proj": 256, "gate_proj": 256}
        rows |= {"up_proj": 256, "down_proj": 256, "embed_tokens": 128, "lm_head": 128}
        kind = name.split(".")[-2]
        shape = (rows[kind], cols) if kind in rows else (cols,)
        w = 0.05 * rng.standard_normal(shape).astype("f4") + (len(shape) == 1)
        format_ = format if name.startswith("model.layers") and len(shape) == 2 else "f32"
        made[name] = formats.quantize(format_, np.atleast_2d(w))._replace(name=name, shape=shape)
    ids = rng.integers(0, 128, (1, 20))
    batch, found = Batch(ids[:, :-1], ids[:, 1:], np.ones((1, 19), bool)), []
    for hold in (True, False):
        network = Network(meta, made, hold=hold)
        learned, _ = lora.attach(network, lora.Settings(r=2), 0)
        gradients(network, batch, 19)
        found.append({n: v.grad for n, v in learned.items() if n.endswith("lora_b")})
    assert len(found[0]) == 8
    for name, grad in found[0].items():
        np.testing.assert_allclose(grad, found[1][name], rtol=1e-4, atol=1e-7)
