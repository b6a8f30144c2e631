"""Models that tools make for benchmarks, read by edgeq and by gguf-py."""

from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from gguf_bytes import model as gguf_model

from edgeq import arch, files, formats

LAYERS, TOKENS = 16, 40


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module tools/bench_models.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    return pytest.importorskip("bench_models")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Llama in Q4_1, its embedding in Q8_0."""
    rng = np.random.default_rng(0)
    meta = {
        "general.architecture": "llama",
        "general.file_type": 3,
        "llama.block_count": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(TOKENS)],
        "tokenizer.ggml.token_type": np.ones(TOKENS, np.int32),
        "tokenizer.ggml.add_bos_token": False,
    }
    tensors = {"blk.0.attn_norm.weight": np.ones(64, np.float32)}
    for name, kind in (("token_embd.weight", "Q8_0"), ("blk.0.ffn_up.weight", "Q4_1")):
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(rng.standard_normal((TOKENS, 64)).astype(np.float32), kind)
        tensors[name] = (int(kind), (TOKENS, 64), data.tobytes())
    path = tmp_path / "source.gguf"
    path.write_bytes(gguf_model(meta, tensors))
    return path


# what llama_model_quantize of llama.cpp makes of a Llama with sixteen layers and no head of its own
MORE_BITS = [0, 1, 4, 7, 10, 13, 14, 15]
EXPECTED = {
    "q4_0": ("Q4_0", "Q6_K", "Q4_0"),
    "q4_k_m": ("Q4_K", "Q6_K", "Q6_K"),
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "tq2_0": ("TQ2_0", "Q6_K", "TQ2_0"),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_random_llama(tool: ModuleType, source: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.gguf"
    tool.random_llama(kind, source, path, tool.Shape(dim=256, layers=LAYERS, ffn=512, heads=4, kv_heads=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "source.gguf"])
    most, embedding, precious = EXPECTED[kind]
    for tensor in gguf.GGUFReader(path).tensors:
        part = tensor.name.split(".")[-2]
        want = {"token_embd": embedding}.get(part, "F32" if part.endswith("norm") else most)
        if part in ("attn_v", "ffn_down") and int(tensor.name.split(".")[1]) in MORE_BITS:
            want = precious
        assert (tensor.name, tensor.tensor_type.name) == (tensor.name, want)
        if want != "F32":
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert weights.std() == pytest.approx(tool.DEVIATION, rel=0.1)
            assert abs(weights.mean()) < tool.DEVIATION
    meta, tensors = files.read(path)
    assert meta["tokenizer.ggml.tokens"] == [f"t{i}" for i in range(TOKENS)]
    model = arch.load(meta, tensors, path=path, backend="numpy")
    assert (model.config.layers, model.config.kv_heads, model.config.vocab_size) == (LAYERS, 2, TOKENS)
    logits = model([1, 2, 3], model.new_cache(3), logits="all")
    assert 0.01 < logits.std() < 100
    if kind == "tq2_0":
        codes, _ = formats.unpack(tensors["blk.0.ffn_up.weight"])
        np.testing.assert_array_equal(np.unique(codes), [0, 1, 2])


@pytest.mark.parametrize(("kind", "step"), [("q8_0", 0.05), ("q4_0", 0.6)])
def test_requantized(tool: ModuleType, source: Path, tmp_path: Path, kind: str, step: float) -> None:
    path = tmp_path / f"{kind}.gguf"
    tool.requantized(kind, source, path)
    (before, old), (after, new) = files.read(source), files.read(path)
    assert before.keys() == after.keys() - {"general.alignment"}
    assert after["general.file_type"] == tool.KINDS[kind].file_type
    assert after["tokenizer.ggml.tokens"] == before["tokenizer.ggml.tokens"]
    # columns that hold no whole block of Q6_K leave the embedding in Q8_0
    assert [new[name].format for name in old] == ["f32", "q8_0", kind]
    for name in old:
        error = np.abs(formats.dequantize(new[name]) - formats.dequantize(old[name])).max()
        assert error <= (step if name.startswith("blk") else 0)


def test_a_model_is_made_once_and_whole(
    tool: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tool.catalog, "resolve", lambda name: source)
    made = []

    def make(source: Path, path: Path) -> None:
        made.append(path)
        tool.requantized("q8_0", source, path)

    monkeypatch.setitem(tool.MODELS, "mine", make)
    assert tool.resolve("mine") == tool.resolve("mine") == made[0]
    assert len(made) == 1
    assert tool.resolve("another") == source
    broken = tool.Matrix("x", (1, 32), tool.Type.Q8_0, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tool.write(made[0].with_name("broken"), tool.KINDS["q8_0"], [], {}, [broken])
    assert list(made[0].parent.iterdir()) == made
