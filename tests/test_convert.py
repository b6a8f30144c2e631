"""Conversion: a folder and the file made of it give the same logits and the same ids, and lead back to it."""

import json
import re
import shutil
from functools import partial

import gguf
import numpy as np
import pytest
from folders import GOLDEN, byte_level, complete
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from edgeq import EdgeqError, FormatError, arch, files, formats, quantizers, tokenizer
from edgeq.convert.huggingface import to_huggingface
from edgeq.convert.source import open_source, size_label
from edgeq.files import gguf_writer
from edgeq.files.output import Entry
from edgeq.tensor import Tensor
from edgeq.tokenizer import as_gguf, as_huggingface, bpe, sentencepiece

TINY = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
# GGUF cannot state the scale of attention, which the golden model has of its own
OWN = {"gemma3": {"query_pre_attn_scalar": 16}}


def logits(path, ids):
    model = arch.load(*files.read(path), backend="numpy", path=path)
    return model(ids, model.new_cache(len(ids)), "all")


def expected(name, path, ids):
    """Logits by Transformers, where the model is still the one that it computed."""
    return logits(path, ids) if name in OWN else np.load(GOLDEN / name / "golden.npz")["logits"]


@pytest.mark.parametrize("name", TINY)
def test_there_and_back(name, tmp_path):
    source = complete(name, tmp_path / "folder", **OWN.get(name, {}))
    ids = np.load(GOLDEN / name / "golden.npz")["ids"]
    theirs = expected(name, source, ids)
    quantizers.quantize(source, tmp_path / "model.gguf", "f32")
    np.testing.assert_allclose(logits(tmp_path / "model.gguf", ids), theirs, atol=5e-5, rtol=0)

    to_huggingface(tmp_path / "model.gguf", tmp_path / "back")
    np.testing.assert_allclose(logits(tmp_path / "back", ids), theirs, atol=5e-5, rtol=0)
    (_, before), (_, after) = files.read(source), files.read(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        w = formats.dequantize(tensor)
        # 1 is added to the gains of gemma's norms, and taken off
        np.testing.assert_allclose(
            formats.dequantize(after[key]), w, atol=1e-7 if w.shape[0] == 1 else 0, rtol=0
        )

    old, new = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "back"))
    stated = {k: v for k, v in new.items() if k in old and k not in ("torch_dtype", "rope_scaling")}
    assert stated == {k: old[k] for k in stated}
    assert len(stated) >= 15


def test_llama3_scaling_is_told_by_a_tensor_and_recognized(tmp_path):
    source = complete("llama-3", tmp_path / "folder")
    quantizers.quantize(source, tmp_path / "model.gguf", "f32")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert theirs["rope_freqs.weight"].data[0] == 1
    to_huggingface(tmp_path / "model.gguf", tmp_path / "back")
    old, new = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "back"))
    assert new["rope_scaling"] == old["rope_scaling"]


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_types(tmp_path, outtype):
    source = complete("llama", tmp_path / "folder")
    quantizers.quantize(source, tmp_path / "model.gguf", outtype, pure=True)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"]
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    whole = dict(open_source(source).tensors)
    for tensor in reader.tensors:
        w = formats.dequantize(whole[tensor.name]).reshape(whole[tensor.name].shape)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = 4 if "attn_q" in tensor.name else 2
            w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        expected = gguf.quantize(w, kind if w.ndim > 1 else gguf.GGMLQuantizationType.F32)
        assert tensor.tensor_type == (kind if w.ndim > 1 else gguf.GGMLQuantizationType.F32), tensor.name
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name


def test_metadata(tmp_path):
    source = complete("llama", tmp_path / "Tiny-Model")
    quantizers.quantize(source, tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    meta = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert len(meta.pop("tokenizer.ggml.tokens")) == len(meta.pop("tokenizer.ggml.token_type")) == 128
    assert meta == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny-Model",
        "general.size_label": "78K",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.freq_base": 50000,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the", "1 2", "Ġ Ġ", "' s"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    ("weights", "label"),
    [(134_515_008, "135M"), (1_100_048_384, "1.1B"), (260_032, "260K"), (9_800_000, "10M")],
)
def test_size_labels_are_those_of_gguf_py(weights, label):
    assert size_label(weights) == gguf.size_label(weights, 0, 0, 0) == label


TEXT = "Once upon a time, there was a little girl.\n  She  ran 3.14 miles — naïvely."


def test_stories260k(stories260k, tmp_path):
    quantizers.quantize(stories260k, tmp_path / "model.gguf", "copy")
    to_huggingface(tmp_path / "model.gguf", tmp_path / "back")
    ids = tokenizer.load(stories260k).encode(TEXT)
    theirs = logits(stories260k, ids)
    for path in (tmp_path / "model.gguf", tmp_path / "back"):
        assert tokenizer.load(path).encode(TEXT) == ids
        np.testing.assert_allclose(logits(path, ids), theirs, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"])
def test_vocabularies_become_folders_and_are_themselves_again(name, shared, tmp_path):
    """The ids are llama.cpp's."""
    path = shared / "data" / "vocab" / f"ggml-vocab-{name}.gguf"
    meta = files.read(path)[0]
    for file, text in as_huggingface.files(meta, path).items():
        (tmp_path / file).write_bytes(text)
    folder = tokenizer.load(tmp_path)
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    for text, ids in zip(texts, path.with_suffix(".gguf.out").read_text().splitlines(), strict=False):
        assert folder.encode(text, add_special=False) == [int(id) for id in ids.split()], text
    again = as_gguf.metadata(tmp_path, len(folder.tokens))
    for key in again.keys() & meta.keys():
        if key == "tokenizer.ggml.pre":  # several names may stand for one way
            assert bpe.CUTS.get(again[key]) == bpe.CUTS.get(meta[key])
        elif key not in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            assert again[key] == meta[key], key


def test_a_sentencepiece_vocabulary_in_a_json_file(stories260k, tmp_path):
    """As Llama 2's: the order of the merges stands for the scores."""
    source = tmp_path / "folder"
    shutil.copytree(stories260k, source)
    meta = sentencepiece.read(source / "tok512.model")
    for file in source.glob("tok512.*"):
        file.unlink()
    ids = {token: id for id, token in enumerate(meta["tokenizer.ggml.tokens"])}
    scores = meta["tokenizer.ggml.scores"]
    splits = [(token, token[:i], token[i:]) for token in ids for i in range(1, len(token))]
    merges = [(-scores[ids[token]], a, b) for token, a, b in splits if a in ids and b in ids]
    pairs = [(a, b) for _, a, b in sorted(merges)]
    engine = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = decoders.Replace("▁", " ")
    engine.decoder = decoders.Sequence(
        [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    engine.save(str(source / "tokenizer.json"))
    quantizers.quantize(source, tmp_path / "model.gguf", "copy")
    made = tokenizer.load(tmp_path / "model.gguf")
    assert made.encode(TEXT, add_special=False) == engine.encode(TEXT, add_special_tokens=False).ids
    assert made.decode(made.encode(TEXT)) == TEXT


def test_a_vocabulary_smaller_than_the_embedding_is_filled_up(tmp_path):
    source = complete("llama", tmp_path / "folder", size=120)
    quantizers.quantize(source, tmp_path / "model.gguf", "copy")
    meta = files.read(tmp_path / "model.gguf")[0]
    assert meta["tokenizer.ggml.tokens"][119:] == ["<extra13>", *(f"[PAD{i}]" for i in range(120, 128))]
    assert meta["tokenizer.ggml.token_type"][119:].tolist() == [1] + [5] * 8


def test_a_beginning_of_text_is_kept(tmp_path):
    source = complete("llama", tmp_path / "folder")
    byte_level(128, add_bos=True).save(str(source / "tokenizer.json"))
    quantizers.quantize(source, tmp_path / "model.gguf", "copy")
    to_huggingface(tmp_path / "model.gguf", tmp_path / "back")
    for path in (source, tmp_path / "model.gguf", tmp_path / "back"):
        made = tokenizer.load(path)
        assert (made.prefix, made.suffix, made.eos_id) == ((1,), (), 2)
        assert made.eog_ids == {2, 3}
        assert made.chat_template == "{{ messages }}"


def test_an_end_by_another_name_is_kept(tmp_path):
    source = complete("llama", tmp_path / "folder")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40]}))
    quantizers.quantize(source, tmp_path / "model.gguf", "copy")
    assert files.read(tmp_path / "model.gguf")[0]["tokenizer.ggml.eot_token_id"] == 40
    assert tokenizer.load(tmp_path / "model.gguf").eog_ids == {2, 3, 40}


def test_shards(tmp_path):
    source = complete("llama", tmp_path / "folder")
    quantizers.quantize(source, tmp_path / "model.gguf", "f32", max_size=100_000)
    parts = sorted(p.name for p in tmp_path.glob("*.gguf"))
    assert parts == [f"model-{i:05}-of-00004.gguf" for i in range(1, 5)]
    to_huggingface(tmp_path / parts[0], tmp_path / "back", max_size=100_000)
    shards = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    (_, before), (_, after) = files.read(source), files.read(tmp_path / "back")
    assert {k: t.data.tobytes() for k, t in before.items()} == {k: t.data.tobytes() for k, t in after.items()}


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    source = complete("llama", tmp_path / "folder")
    with pytest.raises(EdgeqError, match="not empty"):
        to_huggingface(source, source)
    (tmp_path / "empty").mkdir()
    to_huggingface(source, tmp_path / "empty", "f16")
    with safe_open(tmp_path / "empty" / "model.safetensors", "np") as held:
        assert {held.get_tensor(name).dtype for name in held.keys()} == {np.dtype("f2")}  # noqa: SIM118
    with pytest.raises(ValueError, match="unknown type 'q8_0'"):
        to_huggingface(source, tmp_path / "other", "q8_0")


def broken(name, tmp_path, edit=lambda folder: None, **config):
    source = complete(name, tmp_path / "folder", **config)
    edit(source)
    with pytest.raises(FormatError) as raised:
        quantizers.quantize(source, tmp_path / "model.gguf", "f16")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    return str(raised.value)


def rewrite(folder, change):
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def test_what_gguf_cannot_state_is_refused(tmp_path):
    assert "attention_scale" in broken("gemma3", tmp_path / "a")
    cut = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    odd = {"type": "Sequence", "pretokenizers": [cut, spelled]}
    found = broken("llama", tmp_path / "b", lambda f: rewrite(f, lambda raw: raw.update(pre_tokenizer=odd)))
    assert "cut text into words" in found
    lower = {"type": "Lowercase"}
    found = broken("llama", tmp_path / "c", lambda f: rewrite(f, lambda raw: raw.update(normalizer=lower)))
    assert "gives other ids" in found
    assert "140 tokens" in broken("llama", tmp_path / "d", size=140)
    assert "no vocabulary" in broken("llama", tmp_path / "e", lambda f: (f / "tokenizer.json").unlink())
    assert "32 rows" in broken("llama", tmp_path / "f", num_key_value_heads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": np.zeros((2, 2), np.float32)}, "tensor extra.weight: found no place"),
        (
            {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)},
            "rope_freqs.weight: found other factors",
        ),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "found biases of attn_q alone"),
    ],
)
def test_what_a_folder_cannot_state_is_refused(change, message, tmp_path):
    quantizers.quantize(complete("llama", tmp_path / "folder"), tmp_path / "model.gguf", "f32")
    meta, tensors = files.gguf.read_exact(tmp_path / "model.gguf")
    tensors |= {n: Tensor(n, "f32", w.shape, w.view(np.uint8).reshape(-1)) for n, w in change.items()}
    held = [Entry(t.name, 0, t.shape, t.nbytes, partial(iter, [t.data])) for t in tensors.values()]
    gguf_writer.write(tmp_path / "changed.gguf", meta, held)
    with pytest.raises(FormatError, match=re.escape(message)):
        to_huggingface(tmp_path / "changed.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()
