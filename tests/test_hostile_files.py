"""Files that are cut, wrong, or made to do harm: FormatError and nothing else, in bounded time and memory.

The attacks on GGUF are those on record for its readers (lengths that wrap, counts that allocate, offsets past
the end), and all that a few changed bytes can make of a sound header.
"""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import gguf_bytes as gb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import FormatError, files
from edgeq.files import source, strict_json

EDGES = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def attempt(path: Path) -> tuple | FormatError:
    """What a file holds, or why it was refused; any other exception fails the test."""
    try:
        return files.read(path)
    except FormatError as e:
        return e


def assert_harmless(path: Path) -> None:
    """The file is refused with a message of bounded length, or what it gives lies inside of it."""
    result = attempt(path)
    if isinstance(result, FormatError):
        assert str(path) in str(result)
        assert len(str(result)) < 1000
        assert result.found
        assert result.expected
        return
    meta, tensors = result
    assert all(isinstance(key, str) for key in meta)
    assert sum(t.data.nbytes for t in tensors.values()) <= path.stat().st_size
    for tensor in tensors.values():
        tensor.data.tobytes()


def refusal(path: Path, data: bytes) -> str:
    """The message with which a file is refused."""
    path.write_bytes(data)
    result = attempt(path)
    assert isinstance(result, FormatError)
    assert result.path == str(path)
    return str(result)


def small() -> bytes:
    """A small sound file with a key of every type, an array of every type, and two tensors."""
    keys = [gb.key("general.architecture", gb.STRING, "llama"), gb.key("general.alignment", gb.U32, 32)]
    for kind in range(13):
        if kind not in (gb.STRING, gb.ARRAY):
            keys += [gb.key(f"k{kind}", kind, 1), gb.key(f"a{kind}", gb.ARRAY, (kind, [1, 0, 1]))]
    keys += [
        gb.key("tokenizer.ggml.tokens", gb.ARRAY, (gb.STRING, ["a", "", "ł"])),
        gb.key("tokenizer.ggml.scores", gb.ARRAY, (gb.F32, [0, 0, 0])),
        gb.key("tokenizer.ggml.eos_token_id", gb.U32, 2),
    ]
    return gb.file(keys, [gb.info("w", [32, 2], 2), gb.info("b", [5], 0, 64)], bytes(64 + 20))


# Files of other kinds

OTHERS = {
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n": "a git-LFS pointer",
    b"\n <!DOCTYPE HTML><html><title>404</title>": "an HTML page",
    b"\xef\xbb\xbf<html>": "an HTML page",
    b'<?xml version="1.0"?><Error>AccessDenied</Error>': "an XML document",
    b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(50): "a zip of pickles",
    b"PK\x03\x04" + bytes(26) + b"readme.txt" + bytes(50): "a zip archive",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a Python pickle",
    b"\x80\x04\x95\x10\x00": "a Python pickle",
    b"\x1f\x8b\x08\x00": "a gzip archive",
    b"lmgg\x01\x00": "a GGML file",
    b"tjgg\x03\x00\x00\x00": "a GGJT file",
    b"\x40\0\0\0\0\0\0\0" + b'{"w":{}}' + bytes(64): "a safetensors file",
    b'{"error": "Repository not found"}': r"JSON, {\"error\"",
    b"Entry not found": "text, Entry not found",
    b"Invalid username or password.": "text, Invalid",
    bytes(4096): "zeros",
    b"   \n  ": "unknown bytes, 20 20",
    b"\x7fELF\x02\x01\x01\x00\x00": "unknown bytes, 7f 45 4c 46",
    b"\xff": "unknown bytes, ff",
    b"GGU": "text, GGU",
}


@pytest.mark.parametrize("data", OTHERS, ids=OTHERS.values())
def test_other_kinds_are_named(tmp_path, data):
    message = refusal(tmp_path / "model.gguf", data)
    assert OTHERS[data].replace("\\", "") in message


def test_gguf_and_pickle_in_place_of_safetensors(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for data, name in ((small(), "a GGUF file"), (b"\x80\x02}q\x00.", "a Python pickle")):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(FormatError, match=rf"model\.safetensors: found {name}"):
            files.read(tmp_path)


def test_folder_pipe_and_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FormatError, match="a folder, pipe or device"):
            files.read(path)
    with pytest.raises(FormatError, match="a folder, pipe or device"):
        files.gguf.read(tmp_path)


@given(head=st.binary(max_size=40), size=st.integers(0, 1 << 64))
@settings(deadline=None)
def test_anything_is_recognized_as_something(head, size):
    found, hint = source.recognize(head, size)
    assert found.isprintable()
    assert hint.isprintable()


# GGUF: single faults


def keyed(*keys: bytes) -> bytes:
    return gb.file(keys)


def tensed(*infos: bytes, data: bytes = bytes(256), **counts) -> bytes:
    return gb.file([], infos, data, **counts)


def aligned(kind: int, value) -> bytes:
    return keyed(gb.key("general.alignment", kind, value))


ALIGNMENT = r"general.alignment: found"
FAULTS = {
    # the preamble
    "version 1": (gb.file(version=1), "version: found 1, expected 2 or 3"),
    "version 4": (gb.file(version=4), "version: found 4"),
    "big-endian 2": (gb.file(version=2 << 24), "a big-endian GGUF file"),
    "big-endian 3": (gb.file(version=3 << 24), "a big-endian GGUF file"),
    "tensors without end": (
        gb.file(n_tensors=(1 << 64) - 1),
        "number of tensors: found 18,446,744,073,709,551,615",
    ),
    "keys without end": (gb.file(n_keys=1 << 63), "number of keys: found 9,223,372,036,854,775,808"),
    # keys
    "empty key": (keyed(gb.key("", gb.U8, 1)), "an empty name"),
    "key twice": (keyed(gb.key("k", gb.U8, 1), gb.key("k", gb.U8, 2)), "key k: found it twice"),
    "key of 65536 bytes": (
        keyed(gb.key("k" * 65536, gb.U8, 1)),
        "a text of 65,536 bytes, expected at most 65,535",
    ),
    "key not UTF-8": (
        keyed(gb.key(b"\xff\xfe", gb.U8, 1)),
        "name of key 0: found b'\\xff\\xfe', which is not UTF-8",
    ),
    "text not UTF-8": (keyed(gb.key("k", gb.STRING, b"a\x80")), "key k: found b'a\\x80', which is not UTF-8"),
    "element not UTF-8": (
        keyed(gb.key("k", gb.ARRAY, (gb.STRING, ["a", b"\x80"]))),
        "key k[1]: found b'\\x80'",
    ),
    "type 13": (keyed(gb.string("k") + struct.pack("<IQ", 13, 0)), "key k: found value type 13"),
    "type 2^32 - 1": (keyed(gb.string("k") + struct.pack("<IQ", (1 << 32) - 1, 0)), "value type 4294967295"),
    "bool of 2": (keyed(gb.string("k") + struct.pack("<IB", gb.BOOL, 2) + bytes(9)), "neither 0 nor 1"),
    "array of bools of 2": (
        keyed(gb.string("k") + struct.pack("<IIQ3B", gb.ARRAY, gb.BOOL, 3, 0, 1, 2)),
        "neither 0",
    ),
    "array of arrays": (
        keyed(gb.string("k") + struct.pack("<IIQQ", gb.ARRAY, gb.ARRAY, 1, 0)),
        "an array of arrays",
    ),
    "array of type 13": (keyed(gb.string("k") + struct.pack("<IIQQ", gb.ARRAY, 13, 1, 0)), "value type 13"),
    "array of 2^61 u64": (
        keyed(gb.string("k") + struct.pack("<IIQQ", gb.ARRAY, gb.U64, 1 << 61, 0)),
        "key k: found 18,446,744,073,709,551,616 bytes to read",
    ),
    "array of 2^64 - 1 texts": (
        keyed(gb.string("k") + struct.pack("<IIQQ", gb.ARRAY, gb.STRING, (1 << 64) - 1, 0)),
        "key k[1]: found 8 bytes to read",
    ),
    # alignment
    **{
        f"alignment {n}": (aligned(gb.U32, n), f"{ALIGNMENT} {n}") for n in (0, 1, 3, 4, 12, 1 << 21, 1 << 31)
    },
    "alignment of u64": (aligned(gb.U64, 32), f"{ALIGNMENT} 32 of type 10"),
    "alignment of bool": (aligned(gb.BOOL, True), f"{ALIGNMENT} True of type 7"),
    "alignment of text": (aligned(gb.STRING, "32"), f"{ALIGNMENT} '32' of type 8"),
    "alignment of array": (aligned(gb.ARRAY, (gb.U32, [32])), f"{ALIGNMENT} array"),
    # tensors
    "empty tensor name": (tensed(gb.info("", [1])), "an empty name"),
    "tensor name of 64 bytes": (tensed(gb.info("n" * 64, [1])), "a text of 64 bytes, expected at most 63"),
    "tensor twice": (tensed(gb.info("t", [8]), gb.info("t", [8], 0, 32)), "tensor t: found it twice"),
    "no dims": (tensed(gb.info("t", [])), "tensor t: found 0 dims, expected 1 to 4"),
    "five dims": (tensed(gb.info("t", [1] * 5)), "tensor t: found 5 dims"),
    "2^32 - 1 dims": (
        tensed(gb.string("t") + struct.pack("<I8Q", (1 << 32) - 1, *[1] * 8)),
        "4,294,967,295 dims",
    ),
    "dim of 0": (tensed(gb.info("t", [4, 0])), "tensor t: found shape (0, 4), expected positive dims"),
    "dims that wrap to 0": (tensed(gb.info("t", [1 << 32, 1 << 32])), "product is below 2^63"),
    "dims that wrap to 4": (tensed(gb.info("t", [(1 << 62) + 1, 4])), "product is below 2^63"),
    "dims that wrap to 32": (tensed(gb.info("t", [32, (1 << 63) + 1, 2, 1])), "product is below 2^63"),
    "bytes that wrap": (tensed(gb.info("t", [1 << 62])), "tensor t: found a file of"),
    "unsupported type": (
        tensed(gb.info("t", [256], 16)),
        "tensor t: found type IQ2_XXS (number 16), expected one of",
    ),
    "unknown type": (tensed(gb.info("t", [1], 99)), "tensor t: found type unknown (number 99)"),
    "tensor type 2^32 - 1": (tensed(gb.info("t", [1], (1 << 32) - 1)), "type unknown (number 4294967295)"),
    "half a block": (
        tensed(gb.info("t", [16], 2)),
        "tensor t: found rows of 16 weights, expected whole blocks",
    ),
    "offset unaligned": (tensed(gb.info("t", [1], 0, 4)), "tensor t: found offset 4, expected 0"),
    "offset at the end": (tensed(gb.info("t", [1], 0, 256)), "tensor t: found offset 256, expected 0"),
    "offset of 2^64 - 32": (tensed(gb.info("t", [1], 0, (1 << 64) - 32)), "tensor t: found offset"),
    "overlap": (
        tensed(gb.info("t", [16]), gb.info("u", [1], 0, 32)),
        "tensor u: found offset 32, expected 64",
    ),
    "hole": (tensed(gb.info("t", [1]), gb.info("u", [1], 0, 64)), "tensor u: found offset 64, expected 32"),
    "past the end": (
        tensed(gb.info("t", [65])),
        "tensor t: found a file of 320 bytes, expected at least 324",
    ),
    "no data at all": (tensed(gb.info("t", [1]), data=b""), "tensor t: found a file of"),
    # splits
    "split of text": (
        keyed(gb.key("split.count", gb.STRING, "2")),
        "split.count: found str, expected a whole",
    ),
    "split of array": (
        keyed(gb.key("split.count", gb.ARRAY, (gb.U16, [2, 2]))),
        "split.count: found array of uint16",
    ),
    "65535 parts": (
        keyed(gb.key("split.count", gb.U16, 65535), gb.key("split.tensors.count", gb.I32, 0)),
        "65,535",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(tmp_path, name):
    data, message = FAULTS[name]
    assert message in refusal(tmp_path / "model.gguf", data)


def test_names_do_not_reach_the_terminal_raw(tmp_path):
    hostile = "\x1b]0;owned\x07\u202e" + "x" * 10_000
    for data in (
        keyed(gb.key(hostile, gb.U8, 1), gb.key(hostile, gb.U8, 1)),
        keyed(gb.string(hostile) + struct.pack("<IQ", 99, 0)),
        tensed(gb.info("\x1b[2J", [0])),
    ):
        message = refusal(tmp_path / "model.gguf", data)
        assert message.isprintable()
        assert len(message) < 500


# GGUF: every place at once


def test_sound(tmp_path):
    (tmp_path / "model.gguf").write_bytes(small())
    meta, tensors = files.read(tmp_path / "model.gguf")
    assert len(meta) == 27
    assert meta["tokenizer.ggml.tokens"] == ["a", "", "ł"]
    assert {name: (t.format, t.shape) for name, t in tensors.items()} == {
        "w": ("q4_0", (2, 32)),
        "b": ("f32", (5,)),
    }


def test_every_truncation(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small())
    for size in reversed(range(len(small()))):
        os.truncate(path, size)
        assert isinstance(attempt(path), FormatError)


@pytest.mark.parametrize(
    ("width", "values"),
    [("<I", [0, 1 << 31, (1 << 32) - 1]), ("<Q", [1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1])],
)
def test_every_field_at_its_edges(tmp_path, width, values):
    """Any four or eight bytes of the header replaced by a number that overflows something."""
    whole, path = small(), tmp_path / "model.gguf"
    path.write_bytes(whole)
    with open(path, "r+b") as f:
        for value in values:
            for start in range(len(whole) - 84):
                os.pwrite(f.fileno(), struct.pack(width, value), start)
                assert_harmless(path)
                os.pwrite(f.fileno(), whole[start : start + 8], start)


MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([struct.pack("<Q", n) for n in EDGES])),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, mutations: list) -> bytes:
    """Bytes overwritten, or inserted, at places given as parts of the length."""
    for place, change, insert in mutations:
        at = int(place * len(data))
        data = data[:at] + change + data[at + (0 if insert else len(change)) :]
    return data


@settings(deadline=None, max_examples=500)
@given(mutations=MUTATIONS)
def test_mutated_header(tmp_path_factory, mutations):
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutate(small(), mutations))
    assert_harmless(path)


@settings(deadline=None, max_examples=30)
@given(mutations=MUTATIONS, keep=st.floats(0, 1))
def test_mutated_real_header(shared, tmp_path_factory, mutations, keep):
    """The real metadata of a Llama: its keys, or its 32,000 tokens, hit in some places, and cut."""
    real = (shared / "data/vocab/ggml-vocab-llama-spm.gguf").read_bytes()
    near_keys = [(place * 0.001, change, insert) for place, change, insert in mutations[1:]]
    changed = mutate(real, mutations[:1] + near_keys)
    path = tmp_path_factory.getbasetemp() / "real.gguf"
    path.write_bytes(changed[: int(keep * len(changed))])
    assert_harmless(path)


# Memory. The 64 MB that a header may cost beyond its file are made 9 here, so that small files can ask for
# more.

LLAMA = "🦙".encode()  # one such letter makes Python take four bytes for each letter of a text
SIZE = 2_000_000


@pytest.fixture
def spare(monkeypatch) -> int:
    """Bytes that a header may cost beyond its file."""
    assert source.SPARE + 8_000_000 <= 64_000_000
    monkeypatch.setattr(source, "SPARE", 1_000_000)
    return 9_000_000


def peak(call) -> int:
    """Bytes allocated by a call at its worst moment."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array_of(text: bytes) -> bytes:
    one = gb.string(text)
    count = SIZE // len(one)
    return keyed(gb.string("k") + struct.pack("<IIQ", gb.ARRAY, gb.STRING, count) + one * count)


def distinct(make) -> list[bytes]:
    return [make(f"{i:x}") for i in range(50_000)]


GREEDY = {
    "short texts": lambda: array_of(LLAMA),
    "longer texts": lambda: array_of(LLAMA + b"x" * 1000),
    "long texts": lambda: array_of(LLAMA + b"x" * 5000),
    "one text": lambda: keyed(gb.key("k", gb.STRING, LLAMA + b"x" * SIZE)),
    "keys": lambda: gb.file(distinct(lambda name: gb.key(name, gb.F64, 0.1))),
    "empty arrays": lambda: gb.file(distinct(lambda name: gb.key(name, gb.ARRAY, (gb.U8, [])))),
    "tensors": lambda: gb.file([], distinct(lambda name: gb.info(name, [2**40]))),
}
MODEST = {
    "numbers": lambda: keyed(gb.string("k") + struct.pack("<IIQ", gb.ARRAY, gb.U8, SIZE) + bytes(SIZE)),
    "a text without end": lambda: keyed(
        gb.string("k") + struct.pack("<IQ", gb.STRING, 1 << 40) + bytes(SIZE)
    ),
    "empty texts": lambda: array_of(b""),
    "counts": lambda: gb.file(n_keys=SIZE // 14, data=bytes(SIZE)),
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_of_a_greedy_gguf(tmp_path, spare, name):
    data = GREEDY[name]()
    assert peak(lambda: refusal(tmp_path / "model.gguf", data)) < len(data) + spare
    assert "needs more memory than the file's size and 64 MB" in refusal(tmp_path / "model.gguf", data)


@pytest.mark.parametrize("name", MODEST)
def test_memory_of_a_modest_gguf(tmp_path, spare, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(MODEST[name]())
    assert peak(lambda: assert_harmless(path)) < path.stat().st_size + spare


def repeated(one: bytes, size: int) -> bytes:
    return b"[" + b",".join([one] * (size // len(one))) + b"]"


GREEDY_JSON = {
    "lists": lambda n: repeated(b"[]", n),
    "lists in lists": lambda n: repeated(b"[" * 400 + b"]" * 400, n),
    "objects": lambda n: repeated(b"{}", n),
    "objects in objects": lambda n: repeated(b'{"":' * 200 + b"0" + b"}" * 200, n),
    "small objects": lambda n: repeated(b'{"":0}', n),
    "numbers": lambda n: repeated(b"0.1", n),
    "whole numbers": lambda n: repeated(b"999", n),
    "texts": lambda n: repeated(b'"%s"' % LLAMA, n),
    "one text": lambda n: b'"' + LLAMA + b"x" * n + b'"',
    "escapes": lambda n: b'"' + LLAMA + b"\\n" * (n // 2) + b'"',
    "names": lambda n: b"{" + b",".join(b'"%x":0.1' % i for i in range(n // 12)) + b"}",
}


@pytest.mark.parametrize("name", GREEDY_JSON)
def test_charge_for_json_is_an_upper_bound(name):
    text = b'{"a":' + GREEDY_JSON[name](100_000) + b"}"
    allowance = source.Allowance()
    taken = peak(lambda: strict_json.parse(text, "path", "", allowance))
    assert taken < source.SPARE - allowance.left


@pytest.mark.parametrize("name", GREEDY_JSON)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_memory_of_hostile_json(tmp_path, spare, name, file):
    text = b'{"model_type":"llama","a":' + GREEDY_JSON[name](SIZE) + b"}"
    (tmp_path / "config.json").write_text('{"model_type":"llama"}')
    (tmp_path / file).write_bytes(struct.pack("<Q", len(text)) * (file != "config.json") + text)
    assert peak(lambda: attempt(tmp_path)) < len(text) + spare
    assert "needs more memory" in str(attempt(tmp_path))


def test_real_headers_fit_their_allowance(tmp_path):
    """As many tokens as Gemma 3 has and nothing else; a thousand tensors; a large tokenizer_config."""
    tokens = [f"▁token{i}" for i in range(262_144)]
    numbers = {"tokenizer.ggml.scores": np.zeros(262_144, np.float32)}
    (tmp_path / "vocab.gguf").write_bytes(gb.model({"tokenizer.ggml.tokens": tokens} | numbers, {}))
    assert files.read(tmp_path / "vocab.gguf")[0]["tokenizer.ggml.tokens"] == tokens
    assert len(files.read(tmp_path / "vocab.gguf", mmap=False)[0]["tokenizer.ggml.tokens"]) == 262_144

    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    added = {f"{i}": {"content": f"<unused{i}>", "lstrip": False, "special": True} for i in range(6_400)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}, indent=2))
    entry = {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}
    header = json.dumps({f"model.layers.{i}.self_attn.q_proj.weight": entry for i in range(1_000)}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert len(files.read(tmp_path)[1]) == 1_000


# A file that changes


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(small())
    tensors = files.gguf.Header.tensors

    def shrink(header, count):
        os.truncate(path, 100)
        return {} if count == 0 else tensors(header, 0)

    monkeypatch.setattr(files.gguf.Header, "tensors", shrink)
    with pytest.raises(FormatError, match="found 100 bytes now, expected the"):
        files.read(path)
