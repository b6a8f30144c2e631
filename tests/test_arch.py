"""Every architecture against Transformers, on tiny random models (see tools/make_arch_goldens.py) and on
real ones.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgeq import arch, files
from edgeq.arch import gemma3, huggingface
from edgeq.errors import ContextFull, FormatError
from edgeq.tensor import Tensor

GOLDEN = Path(__file__).parent / "golden" / "arch"
TINY = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
BACKENDS = {"numpy": 5e-5, "numba": 2e-2}  # largest difference of a logit; the fast path's cache is float16


def tiny(name, backend="numpy", config="config.json"):
    meta, tensors = files.read(GOLDEN / name)
    if config != "config.json":
        meta = meta | {"config": json.loads((GOLDEN / name / config).read_text())}
    return arch.load(meta, tensors, backend=backend, path=GOLDEN / name)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_transformers(name, backend):
    golden = np.load(GOLDEN / name / "golden.npz")
    model = tiny(name, backend)
    got = model(golden["ids"], model.new_cache(len(golden["ids"])), "all")
    np.testing.assert_allclose(got, golden["logits"], atol=BACKENDS[backend], rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_config_in_the_spelling_of_transformers_5(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    model = tiny(name, config="config-v5.json")
    got = model(golden["ids"], model.new_cache(len(golden["ids"])), "all")
    np.testing.assert_allclose(got, golden["logits"], atol=BACKENDS["numpy"], rtol=0)


def test_every_architecture_has_a_golden():
    assert {json.loads((GOLDEN / n / "config.json").read_text())["model_type"] for n in TINY} >= {
        {"gemma3": "gemma3_text"}.get(n, n) for n in arch.names()
    }


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token_is_all_at_once(name, backend):
    ids = np.load(GOLDEN / name / "golden.npz")["ids"]
    model = tiny(name, backend)
    at_once = model(ids, model.new_cache(64), "all")
    cache = model.new_cache(64)
    one_by_one = np.concatenate([model([i], cache) for i in ids])
    np.testing.assert_allclose(one_by_one, at_once, atol=5e-3 if backend == "numba" else 5e-5)
    assert cache.tokens == ids.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_a_long_prompt(backend, monkeypatch):
    ids = np.load(GOLDEN / "gemma3" / "golden.npz")["ids"]
    model = tiny("gemma3", backend)
    whole = model(ids, model.new_cache(64), "all")
    monkeypatch.setattr(arch, "CHUNK", 7)
    np.testing.assert_allclose(model(ids, model.new_cache(64), "all"), whole, atol=5e-3)
    np.testing.assert_allclose(model(ids, model.new_cache(64)), whole[-1:], atol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_cache_goes_on_as_if_nothing_had_been(backend):
    ids = np.load(GOLDEN / "llama" / "golden.npz")["ids"]
    model = tiny("llama", backend)
    cache = model.new_cache(64)
    model(ids, cache)
    cache.truncate(20)
    again = model(ids[20:], cache, "all")
    np.testing.assert_allclose(again, model(ids, model.new_cache(64), "all")[20:], atol=5e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_keys_are_those_of_their_new_positions(name, backend):
    """A first layer's keys depend on the token and its position alone, so those of a shifted cache are
    known.
    """
    ids = np.load(GOLDEN / name / "golden.npz")["ids"]
    model = tiny(name, backend)
    shifted, fresh = model.new_cache(64), model.new_cache(64)
    model(ids, shifted)
    shifted.shift(4, 10)
    left = np.concatenate([ids[:4], ids[14:]])
    model(left, fresh)
    assert shifted.tokens == left.tolist()
    n = len(left)
    np.testing.assert_allclose(shifted.read_keys(0, n), fresh.read_keys(0, n), atol=4e-3)
    np.testing.assert_allclose(shifted.values[0][:, :n], fresh.values[0][:, :n], atol=4e-3)


def test_what_does_not_fit_is_an_error_and_leaves_the_cache_alone():
    model = tiny("llama")
    cache = model.new_cache(10)
    model([1, 2, 3], cache)
    with pytest.raises(ContextFull, match="3 \\+ 8 tokens do not fit the context of 10"):
        model([1] * 8, cache)
    for bad in ([], [-1], [model.config.vocab_size]):
        with pytest.raises(ValueError, match="token"):
            model(bad, cache)
    assert cache.tokens == [1, 2, 3]


def test_an_interrupted_call_leaves_the_cache_alone(monkeypatch):
    model = tiny("llama")
    cache = model.new_cache(10)
    model([1, 2, 3], cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.network, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model([4], cache)
    assert cache.tokens == [1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_of_python_take_turns(backend):
    models = [tiny(name, backend) for name in ("llama", "gemma3")]
    ids = [[1, 2, 3, 4], [5, 6, 7]] * 10
    want = [m(i, m.new_cache(8)) for i in ids for m in models]
    with ThreadPoolExecutor(4) as pool:
        got = list(
            pool.map(
                lambda pair: pair[1](pair[0], pair[1].new_cache(8)), [(i, m) for i in ids for m in models]
            )
        )
    np.testing.assert_array_equal(got, want)


def broken(change):
    """The tiny llama with a changed config or changed tensors."""
    meta, tensors = files.read(GOLDEN / "llama")
    meta, tensors = {**meta, "config": dict(meta["config"])}, dict(tensors)
    change(meta["config"], tensors)
    return lambda: arch.load(meta, tensors, backend="numpy", path="folder")


NAME = "model.layers.0.mlp.up_proj.weight"
SMALL = Tensor(NAME, "f32", (4,), np.zeros(16, np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(model_type="mamba"), "architecture: found 'mamba', expected gemma3 or llama"),
        (lambda c, t: c.update(num_hidden_layers=3000), "tensor blk.*: found nothing"),
        (lambda c, t: c.update(num_hidden_layers=10**9), "block_count: found 1000000000"),
        (lambda c, t: c.update(num_attention_heads=0), "num_attention_heads"),
        (lambda c, t: c.update(num_key_value_heads=3), "head_count_kv: found 3, expected a divisor"),
        (lambda c, t: c.update(hidden_size="64"), "hidden_size"),
        (lambda c, t: c.update(rms_norm_eps=-1), "rms_norm_eps"),
        (lambda c, t: c.update(hidden_act="relu"), "hidden_act"),
        (lambda c, t: c.update(rope_scaling={"rope_type": "yarn"}), "rope_scaling"),
        (lambda c, t: c.update(rope_scaling={"type": "linear"}), "factor: found None"),
        (lambda c, t: c.update(rope_scaling=[1]), "rope_scaling"),
        (lambda c, t: c.update(rope_theta="x"), "rope_theta"),
        (lambda c, t: c.update(rope_parameters=5), "rope_parameters"),
        (lambda c, t: c.update(rope_scaling={"rope_type": "llama3", "factor": 0}), "factor: found 0"),
        (lambda c, t: c.update(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (lambda c, t: c.update(intermediate_size=8), "ffn_gate.*: found shape"),
        (lambda c, t: t.pop(NAME), "ffn_up.weight: found nothing"),
        (lambda c, t: t.update({NAME: SMALL}), "found shape \\(4,\\)"),
        (lambda c, t: t.update({"extra": t[NAME]}), "tensor extra: found no place"),
        (lambda c, t: t.pop("model.embed_tokens.weight"), "token_embd.weight: found nothing"),
    ],
)
def test_broken_models_are_named(change, message):
    with pytest.raises(FormatError, match=message):
        broken(change)()


@pytest.mark.parametrize(
    "change", [{"layer_types": 5}, {"layer_types": [[]]}, {"rope_parameters": {"full_attention": 5}}]
)
def test_broken_gemma_configs_are_named(change):
    meta, tensors = files.read(GOLDEN / "gemma3")
    with pytest.raises(FormatError, match=next(iter(change))):
        arch.load({"config": meta["config"] | change}, tensors, backend="numpy")


def test_a_gemma_config_that_relies_on_transformers_defaults():
    """google/gemma-3-4b-it states little more than this of its text model."""
    stated = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    raw = stated | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text"}
    meta = gemma3.from_huggingface(huggingface.Config(raw, "config"))
    assert meta["gemma3.attention.head_count"] == 8
    assert meta["gemma3.attention.head_count_kv"] == 4
    assert meta["gemma3.attention.key_length"] == 256
    assert meta["gemma3.rope.freq_base"] == 1e6
    assert meta["gemma3.rope.freq_base_swa"] == 1e4
    assert meta["gemma3.rope.scaling.factor"] == 8
    assert meta["gemma3.attention.sliding_window_pattern"].tolist()[:7] == [True] * 5 + [False, True]


def as_gguf(name):
    """A tiny model's metadata and tensors as a GGUF file would give them."""
    _, meta, tensors = arch.identify(*files.read(GOLDEN / name), name)
    return {k: v for k, v in meta.items() if not k.startswith("edgeq.")}, tensors


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 1.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 2.0}, 2.0),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scaling.type": "linear"}, 2.0),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scaling.type": "none"}, 1.0),
    ],
)
def test_rope_scaling_of_gguf_files_old_and_new(keys, factor):
    meta, tensors = as_gguf("llama")
    model = arch.load(meta | keys, tensors, backend="numpy")
    assert model.config.rope_factors == factor


@pytest.mark.parametrize(("pattern", "windows"), [(2, [16, 0, 16, 0]), (3, [16, 16, 0, 16])])
def test_gemma_files_that_state_the_pattern_as_a_period(pattern, windows):
    meta, tensors = as_gguf("gemma3")
    meta |= {"gemma3.attention.sliding_window_pattern": pattern, "gemma3.attention.sliding_window": 16}
    model = arch.load(meta, tensors, backend="numpy")
    assert list(model.config.windows[:4]) == windows[: model.config.layers]


def test_a_file_cannot_use_the_names_that_edgeq_keeps_for_itself():
    meta, tensors = as_gguf("llama")
    model = arch.load(meta | {"edgeq.rope_in_halves": True, "config": "x"}, tensors, backend="numpy")
    assert model.config.interleaved


def test_a_whole_cache_can_be_shifted_away():
    model = tiny("llama")
    cache = model.new_cache(16)
    model(list(range(16)), cache)
    cache.shift(0, 16)
    assert cache.length == 0


# ---- real models


def check_golden(model, golden, backend):
    """Compare with what Transformers computed in float32 on the dequantized weights."""
    differences = []
    for case in golden["cases"]:
        ids = case["ids"]
        cache = model.new_cache(len(ids) + len(case["greedy"]))
        logits = model(ids, cache, "all").astype(np.float64)
        top = logits.max(axis=1)
        log_sum = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        nll = log_sum[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
        differences.append(np.abs(nll - case["nll"]))
        assert logits[-1].argmax() == case["top_ids"][0]
        if backend == "numpy":
            np.testing.assert_allclose(logits[-1, case["top_ids"]], case["top_logits"], atol=2e-3, rtol=0)
            assert differences[-1].max() <= 1e-3
        out = [int(logits[-1].argmax())]
        while len(out) < len(case["greedy"]):
            out.append(int(model(out[-1:], cache).argmax()))
        assert out == case["greedy"], case["prompt"]
    assert np.concatenate(differences).mean() <= 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_stories260k(stories260k, shared, backend):
    golden = json.loads((shared / "data" / "golden" / "stories260k.json").read_text())
    check_golden(arch.load(*files.read(stories260k), backend=backend), golden, backend)


@pytest.mark.model
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name, backend, shared, request):
    path = request.getfixturevalue(f"{name}_path")
    golden = json.loads((shared / "data" / "golden" / f"{name}.json").read_text())
    check_golden(arch.load(*files.read(path), backend=backend, path=path), golden, backend)
