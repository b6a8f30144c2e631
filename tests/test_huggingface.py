"""Hugging Face folders: what the safetensors library writes, and what it refuses."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import FormatError, files
from edgeq.files.huggingface import read
from edgeq.files.safetensors import read as read_safetensors
from edgeq.files.source import Allowance

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4}
INDEX = "model.safetensors.index.json"


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; the header is bytes, or made into JSON."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), begin=0, end=4) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path):
    """A folder with a config and one tensor."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(pack({"w": entry(shape=[1, 1])}, struct.pack("<f", 1.5)))
    return tmp_path


def test_reads_what_safetensors_writes(folder):
    rng = np.random.default_rng(0)
    arrays = {
        "model.embed_tokens.weight": rng.random((7, 4), np.float32),
        "model.norm.weight": rng.random(4).astype(np.float16),
        "odd": rng.random(3).astype(np.float16),
        "after.odd": rng.random((2, 3, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    meta, tensors = read(folder)
    assert meta == {"config": CONFIG, "generation_config": {"eos_token_id": [1, 2]}, "tokenizer_config": {}}
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = tensors[name]
        assert tensor.format == {4: "f32", 2: "f16"}[array.itemsize]
        assert tensor.shape == (array.shape or (1,))
        assert tensor.data.tobytes() == array.tobytes()
        assert not tensor.data.flags.writeable
    files.check_finite(folder, tensors.values())


def test_bfloat16(folder):
    data = np.array([0x3FC0, 0xC000], "<u2").tobytes()  # 1.5 and -2
    (folder / "model.safetensors").write_bytes(pack({"w": entry("BF16", [1, 2])}, data))
    tensor = read(folder)[1]["w"]
    assert tensor.format == "bf16"
    assert files.read(folder, mmap=False)[1]["w"].data.tobytes() == tensor.data.tobytes() == data


def test_a_real_checkpoint(stories260k):
    arrays = safetensors.numpy.load_file(stories260k / "model.safetensors")
    meta, tensors = files.read(stories260k)
    assert meta["config"]["model_type"] == "llama"
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        assert np.array_equal(tensors[name].data.view("<f4").reshape(array.shape), array)


# Sharded models


@pytest.fixture
def sharded(folder):
    """Three tensors in two files, as Transformers writes them."""
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    for i, (shard, names) in enumerate(shards.items()):
        safetensors.numpy.save_file({n: np.full(2, i, np.float32) for n in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return folder


def test_sharded(sharded):
    tensors = files.read(sharded)[1]
    assert {n: t.data.view("<f4").tolist() for n, t in tensors.items()} == {
        "a": [0, 0],
        "b": [0, 0],
        "c": [1, 1],
    }


def test_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no model-00002-of-00002\.safetensors"):
        read(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        ".hidden.safetensors",
        "..safetensors",
        "model.bin",
        "nul\0.safetensors",
        "a" * 300 + ".safetensors",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_shard_names_are_plain(sharded, name):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match=r"weight_map, tensor a: .*a plain name"):
        read(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "a", 1])
def test_index_without_a_map(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="weight_map"):
        read(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": "model-00002-of-00002.safetensors"}, "00001-of-.*tensor b: found it, expected it elsewhere"),
        (
            {"d": "model-00002-of-00002.safetensors"},
            "00002-of-.*tensor d: found no such tensor, expected it here",
        ),
    ],
)
def test_index_and_shards_disagree(sharded, change, message):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= change
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=message):
        read(sharded)


def test_too_many_shards(sharded):
    (sharded / INDEX).write_text(
        json.dumps({"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(600)}})
    )
    with pytest.raises(FormatError, match="600 parts, expected at most 512"):
        read(sharded)


# Links


def test_hub_cache(sharded, tmp_path_factory):
    """The layout of huggingface_hub: snapshots of links into blobs, which lie beside them and not inside."""
    cache = tmp_path_factory.mktemp("hub") / "models--user--repo"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sharded.iterdir()):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    assert list(files.read(snapshot)[1]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "model.safetensors", INDEX, "model-00001-of-00002.safetensors"],
)
def test_links_do_not_lead_out(folder, sharded, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / name
    link = folder / name
    if link.exists():
        link.rename(outside)
    else:
        outside.write_text("{}")
    link.symlink_to(outside)
    with pytest.raises(FormatError, match="a link to .*expected a file in the folder of the model"):
        read(folder)


def test_link_in_circles(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(FormatError, match="no weights"):
        read(folder)


# Folders that are something else


def test_quantized(folder):
    for quantization, method in (({"quant_method": "vptq"}, "'vptq'"), ({}, "None"), ("quip", "'quip'")):
        for config in (
            {"quantization_config": quantization},
            {"text_config": {"quantization_config": quantization}},
        ):
            (folder / "config.json").write_text(json.dumps(CONFIG | config))
            with pytest.raises(
                FormatError, match=f"quantization_config: found quant_method {method}, expected none"
            ):
                read(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": None}))
    assert list(read(folder)[1]) == ["w"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("[]", "JSON"),
        ("{", "line 1"),
        ('{"a": 1, "a": 2}', "the name a twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deep"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\uDC00\\uD800": 1}', "half of a surrogate pair"),
        ('{"model_type": 3}', "model_type: found 3"),
        ('{"model_type": "llama", "architectures": "Llama"}', "architectures: found 'Llama'"),
        ('{"model_type": "llama", "architectures": [1]}', "architectures"),
        ("version https://git-lfs.github.com/spec/v1", "a git-LFS pointer"),
        ("<!DOCTYPE html><html>", "an HTML page"),
    ],
)
def test_config_is_checked(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message) as e:
        read(folder)
    assert e.value.path == str(folder / "config.json")
    assert len(str(e.value)) < 500


def test_surrogate_pairs_and_escaped_backslashes_are_text(folder):
    (folder / "tokenizer_config.json").write_text(r'{"a": "\ud83e\udd99 \\ud800 \\\ud83e\udd99"}')
    assert read(folder)[0]["tokenizer_config"] == {"a": "🦙 \\ud800 \\🦙"}


def test_folders_without_a_model(tmp_path):
    with pytest.raises(FormatError, match=r"no config\.json"):
        files.read(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"Give the GGUF file itself: .*model-q4\.gguf"):
        files.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match="found no weights"):
        files.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FormatError, match=r"found pytorch_model\.bin, a pickle.*any code"):
        files.read(tmp_path)


def test_not_a_regular_file(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(FormatError, match="a folder, pipe or device"):
        read(folder)


# safetensors itself

VALUES = struct.pack("<3f", 1, 2, 3)
SOUND = {"a": entry(), "b": entry(shape=[2], begin=4, end=12), "__metadata__": {"format": "pt"}}


def attempt(path: Path) -> dict | FormatError:
    """The tensors of a file, or why it was refused; any other exception fails the test."""
    try:
        return read_safetensors(path, Allowance())
    except FormatError as e:
        return e


def check_with_library(path: Path, data: bytes) -> bool:
    """Whether edgeq reads the file; if so, the library must read the same from it."""
    path.write_bytes(data)
    tensors = attempt(path)
    if isinstance(tensors, FormatError):
        assert str(path) in str(tensors)
        assert len(str(tensors)) < 1000
        return False
    library = dict(safetensors.deserialize(data))  # raises SafetensorError where edgeq should have refused
    assert tensors.keys() == library.keys()
    for name, tensor in tensors.items():
        assert tensor.format == library[name]["dtype"].lower()
        assert tensor.shape == (tuple(library[name]["shape"]) or (1,))
        assert tensor.data.tobytes() == bytes(library[name]["data"])
    return True


@pytest.mark.parametrize(
    "data",
    [
        pack(SOUND, VALUES),
        pack(json.dumps(SOUND).encode() + b"   \n", VALUES),
        pack({}),
        pack({"a": entry(shape=[], end=4)}, bytes(4)),
        pack({"z": entry(shape=[0, 3], begin=4, end=4), "a": entry()}, bytes(4)),
        pack({"b": entry(begin=4, end=8), "a": entry()}, bytes(8)),
    ],
)
def test_sound_files(tmp_path, data):
    assert check_with_library(tmp_path / "m.safetensors", data)


ATTACKS = {
    "header longer than the file": pack(SOUND, VALUES, length=1000),
    "header of 2^63 bytes": pack(SOUND, VALUES, length=1 << 63),
    "header of 2^64 - 1 bytes": pack(SOUND, VALUES, length=(1 << 64) - 1),
    "header above 100 MB": pack(SOUND, VALUES, length=100_000_001),
    "header cut": pack(SOUND, VALUES, length=20),
    "empty header": pack(b"", VALUES),
    "a list": pack([], VALUES),
    "zero byte after the header": pack(json.dumps(SOUND).encode() + b"\0", VALUES),
    "data missing": pack(SOUND, VALUES[:-1]),
    "data left over": pack(SOUND, VALUES + b"\0"),
    "hole": pack({"a": entry(), "b": entry(begin=8, end=12)}, VALUES),
    "overlap": pack({"a": entry(shape=[2], end=8), "b": entry(shape=[2], begin=4, end=12)}, VALUES),
    "same bytes twice": pack({"a": entry(shape=[3], end=12), "b": entry(shape=[3], end=12)}, VALUES),
    "begins late": pack({"a": entry(begin=8, end=12)}, VALUES),
    "offsets reversed": pack({"a": entry(begin=4, end=0)}, bytes(4)),
    "beyond the end": pack({"a": entry(shape=[1000], end=4000)}, VALUES),
    "empty tensor out of place": pack({"a": entry(), "z": entry(shape=[0], begin=2, end=2)}, bytes(4)),
    "size that does not follow from the shape": pack({"a": entry(shape=[2])}, bytes(4)),
    "product wraps to 1": pack({"a": entry(shape=[1 << 63, 2, 0])}, b""),
    "product wraps to 4": pack({"a": entry(shape=[(1 << 62) + 1])}, bytes(4)),
    "negative dim": pack({"a": entry(shape=[-1])}, bytes(4)),
    "two negative dims": pack({"a": entry(shape=[-1, -1])}, bytes(4)),
    "minus zero": pack(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "dim with a fraction": pack({"a": entry(shape=[1.0])}, bytes(4)),
    "dim of true": pack({"a": entry(shape=[True])}, bytes(4)),
    "dim of text": pack({"a": entry(shape=["1"])}, bytes(4)),
    "dim of a million digits": pack(
        b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,4]}}' % (b"0" * 10**6)
    ),
    "dim of NaN": pack(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "shape of null": pack({"a": entry() | {"shape": None}}, bytes(4)),
    "one offset": pack({"a": entry() | {"data_offsets": [4]}}, bytes(4)),
    "three offsets": pack({"a": entry() | {"data_offsets": [0, 4, 4]}}, bytes(4)),
    "unknown dtype": pack({"a": entry("F31")}, bytes(4)),
    "dtype of null": pack({"a": entry() | {"dtype": None}}, bytes(4)),
    "dtype of a list": pack({"a": entry() | {"dtype": ["F32"]}}, bytes(4)),
    "field missing": pack({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "entry of null": pack({"a": None}, bytes(4)),
    "metadata of numbers": pack(SOUND | {"__metadata__": {"n": 1}}, VALUES),
    "metadata of objects": pack(SOUND | {"__metadata__": {"n": {}}}, VALUES),
    "metadata of text": pack(SOUND | {"__metadata__": "pt"}, VALUES),
    "field twice": pack(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "half a surrogate pair": pack(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "not UTF-8": pack(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "lists in lists": pack(b'{"a":' + b"[" * 200_000, bytes(4)),
    "eight bytes": bytes(8),
    "nothing": b"",
}
STRICTER = {
    "tensor twice": pack(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "metadata name twice": pack(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "unknown field": pack({"a": entry() | {"extra": 1}}, bytes(4)),
    "metadata of null": pack({"__metadata__": None}),
    "dims without end": pack({"a": entry(shape=[1] * 9)}, bytes(4)),
    "integers": pack({"a": entry("I32")}, bytes(4)),
    "8-bit integers": pack({"a": entry("I8", [4])}, bytes(4)),
    "space before the header": pack(b" {}"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_the_library_refuses_is_refused(tmp_path, name):
    assert not check_with_library(tmp_path / "m.safetensors", ATTACKS[name])
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(ATTACKS[name])


@pytest.mark.parametrize("name", STRICTER)
def test_what_the_library_allows_and_we_do_not(tmp_path, name):
    assert not check_with_library(tmp_path / "m.safetensors", STRICTER[name])
    safetensors.deserialize(STRICTER[name])


def test_every_truncation(tmp_path):
    whole = pack(SOUND, VALUES)
    for size in range(len(whole)):
        assert not check_with_library(tmp_path / "m.safetensors", whole[:size])


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 12, 13, -1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
JUNK = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.lists(NUMBERS, max_size=3)
)


@st.composite
def mutated_headers(draw):
    """The sound header with some of its values replaced by others, and then some of its bytes."""
    header = json.loads(json.dumps(SOUND))
    for _ in range(draw(st.integers(0, 2))):
        tensor = header[draw(st.sampled_from(["a", "b"]))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if field == "dtype" or draw(st.booleans()):
            tensor[field] = draw(st.one_of(st.sampled_from(["F16", "BF16", "F64", "I8"]), JUNK))
        elif isinstance(tensor[field], list) and tensor[field]:
            tensor[field][draw(st.integers(0, len(tensor[field]) - 1))] = draw(st.one_of(NUMBERS, JUNK))
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.integers(0, 2))):
        text[draw(st.integers(0, len(text) - 1))] = draw(
            st.one_of(st.sampled_from(b'{}[],:"\\0123456789 '), st.integers(0, 255))
        )
    return bytes(text)


@settings(deadline=None, max_examples=400)
@given(header=mutated_headers(), data=st.sampled_from([VALUES, VALUES[:8], VALUES + bytes(4)]))
def test_mutated_headers(tmp_path_factory, header, data):
    check_with_library(tmp_path_factory.getbasetemp() / "mutated.safetensors", pack(header, data))
