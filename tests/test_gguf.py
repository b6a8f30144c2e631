"""GGUF: what gguf-py writes, and what gguf-py reads, is what edgeq reads."""

import mmap
import os
import struct
from pathlib import Path

import gguf
import gguf_bytes as gb
import numpy as np
import pytest

from edgeq import FormatError, files, formats
from edgeq.files.gguf import read

STORED = [name for name in formats.names() if formats.get(name).GGML]


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def assert_equal_to_gguf_py(path: Path) -> None:
    """Every key and every tensor of a file, compared with gguf-py's reader."""
    meta, tensors = read(path)
    theirs = gguf.GGUFReader(path)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(meta) == list(fields)
    for name, field in fields.items():
        mine = meta[name]
        if isinstance(mine, np.ndarray):
            assert mine.dtype == field.parts[field.data[0]].dtype
            assert mine.tolist() == field.contents()
        else:
            assert mine == field.contents()
    assert list(tensors) == [t.name for t in theirs.tensors]
    for tensor, other in zip(tensors.values(), theirs.tensors, strict=True):
        assert other.tensor_type == formats.get(tensor.format).GGML
        assert tensor.shape == tuple(int(dim) for dim in other.shape[::-1])
        assert tensor.data.dtype == np.uint8
        assert tensor.data.tobytes() == other.data.tobytes()


@pytest.fixture
def every_kind(tmp_path):
    """A file by gguf-py with a key of each scalar type, an array of each, and a tensor of each format."""
    writer = gguf.GGUFWriter(tmp_path / "every.gguf", "llama")
    kinds = gguf.GGUFValueType
    numbers = {
        **{kinds.UINT8: 255, kinds.INT8: -128, kinds.UINT16: 65535, kinds.INT16: -32768},
        **{kinds.UINT32: 2**32 - 1, kinds.INT32: -(2**31), kinds.UINT64: 2**64 - 1, kinds.INT64: -(2**63)},
        **{kinds.FLOAT32: 1e-5, kinds.FLOAT64: 1e-300, kinds.BOOL: True},
    }
    for kind, value in numbers.items():
        writer.add_key_value(f"test.{kind.name}", value, kind)
        writer.add_key_value(f"test.array.{kind.name}", [value, type(value)(0), value], kinds.ARRAY, kind)
    writer.add_string("test.text", "naïve “text” 🦙\n\0")
    writer.add_array("test.texts", ["", "a", "🦙" * 2000, "Ġthe"])
    rng = np.random.default_rng(0)
    for name in STORED:
        module = formats.get(name)
        rows = rng.integers(0, 256, (3, 2 * module.BYTES), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType(module.GGML))
    writer.add_tensor("four.dims", np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "every.gguf"


def test_reads_what_gguf_py_writes(every_kind):
    meta, tensors = read(every_kind)
    assert len(meta) > 24
    assert meta["test.UINT64"] == 2**64 - 1
    assert meta["test.FLOAT32"] == float(np.float32(1e-5))
    assert meta["test.BOOL"] is True
    assert meta["test.array.BOOL"].dtype == bool
    assert meta["test.texts"] == ["", "a", "🦙" * 2000, "Ġthe"]
    assert tensors["four.dims"].shape == (2, 3, 4, 5)
    assert_equal_to_gguf_py(every_kind)


def test_real_vocabulary(shared):
    assert_equal_to_gguf_py(shared / "data/vocab/ggml-vocab-llama-spm.gguf")


@pytest.mark.model
def test_real_model(smollm2_path):
    assert_equal_to_gguf_py(smollm2_path)


def test_by_hand(tmp_path):
    """Two tensors, the second of which starts at byte 32 because the first fills 8 of the 32 before it."""
    data = struct.pack("<2f", 1, 2) + bytes(24) + struct.pack("<e16B", 0.5, *[0x21] * 16)
    keys = [gb.key("general.architecture", gb.STRING, "llama"), gb.key("n", gb.I16, -3)]
    for version in (2, 3):
        whole = gb.file(keys, [gb.info("a", [2]), gb.info("b", [32, 1], 2, 32)], data, version=version)
        meta, tensors = read(save(tmp_path / "hand.gguf", whole))
        assert meta == {"general.architecture": "llama", "n": -3}
        assert tensors["a"].data.view("<f4").tolist() == [1, 2]
        assert (tensors["b"].format, tensors["b"].shape) == ("q4_0", (1, 32))
        # 0x21: code 1 in the first half, code 2 in the second; w = 0.5 * (code - 8)
        assert formats.dequantize(tensors["b"]).tolist() == [[-3.5] * 16 + [-3.0] * 16]


@pytest.mark.parametrize("alignment", [8, 64, 1 << 20])
def test_alignment(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.full(3, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equal_to_gguf_py(tmp_path / "aligned.gguf")


def test_last_tensor_needs_no_padding_and_trailing_bytes_are_ignored(tmp_path):
    sound = gb.model({}, {"a": np.arange(3, dtype=np.float32)})
    for tail in (b"", bytes(20), b"appended by somebody"):
        _, tensors = read(save(tmp_path / "tail.gguf", sound + tail))
        assert tensors["a"].data.view("<f4").tolist() == [0, 1, 2]


# Split models


@pytest.fixture
def split(tmp_path):
    """The parts of a model of five tensors, two in a file, by gguf-py."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_string("general.name", "split")
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [p.name for p in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return parts


def test_any_part_stands_for_the_model(split):
    for path in split:
        meta, tensors = read(path)
        assert meta == {"general.architecture": "llama", "general.name": "split"}
        assert {n: t.data.view("<f4").tolist() for n, t in tensors.items()} == {
            f"t{i}": [i] * 6 for i in range(5)
        }


def test_missing_part_is_named(split):
    split[1].unlink()
    with pytest.raises(FormatError, match=r"no m-00002-of-00003\.gguf"):
        read(split[2])


def test_renamed_part(split):
    other = split[0].rename(split[0].with_name("other.gguf"))
    with pytest.raises(FormatError, match=r"split\.count.*-00001-of-"):
        read(other)


def test_swapped_and_repeated_parts(split):
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(FormatError, match=r"00002-of-00003.*split\.no: found 2, expected 1"):
        read(split[0])


def part(number, tensors, count=2, total=2, kind=gb.U16):
    keys = {"split.no": number, "split.count": count, "split.tensors.count": total}
    infos, data = [gb.info(name, [8], 0, 32 * i) for i, name in enumerate(tensors)], bytes(32 * len(tensors))
    return gb.file([gb.key(k, kind, v) for k, v in keys.items()], infos, data)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (part(1, ["a"]), "tensor a: found it in two parts"),
        (part(1, []), "found 1 tensors in 2 parts, expected 2"),
        (part(1, ["b"], total=3), r"split\.tensors\.count: found 3, expected 2"),
        (part(1, ["b"], count=3), r"split\.count: found 3, expected 2"),
        (part(1, ["b"], kind=gb.F32), r"split\.no: found float, expected a whole number"),
        (gb.file(), r"split\.no: found none"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, second, message):
    first = save(tmp_path / "m-00001-of-00002.gguf", part(0, ["a"]))
    save(tmp_path / "m-00002-of-00002.gguf", second)
    with pytest.raises(FormatError, match=message):
        read(first)


def test_parts_may_be_links_into_a_hub_cache_and_not_elsewhere(tmp_path):
    cache = tmp_path / "models--user--repo"
    blobs, snapshot, outside = cache / "blobs", cache / "snapshots" / "0123abc", tmp_path / "outside"
    for folder in (blobs, snapshot, outside):
        folder.mkdir(parents=True)
    for i, name in enumerate("ab"):
        save(blobs / name, part(i, [name]))
        (snapshot / f"m-0000{i + 1}-of-00002.gguf").symlink_to(f"../../blobs/{name}")
    assert list(read(snapshot / "m-00001-of-00002.gguf")[1]) == ["a", "b"]

    second = snapshot / "m-00002-of-00002.gguf"
    save(outside / "b", second.read_bytes())
    second.unlink()
    second.symlink_to(outside / "b")
    with pytest.raises(FormatError, match="a link to"):
        read(snapshot / "m-00001-of-00002.gguf")


# Memory


def test_tensors_are_read_only_views_of_the_mapped_file(every_kind):
    for tensor in read(every_kind)[1].values():
        base = tensor.data
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj, mmap.mmap)
        assert not tensor.data.flags.writeable


def test_without_mmap(every_kind):
    meta, tensors = read(every_kind)
    meta_read, tensors_read = read(every_kind, mmap=False)
    os.truncate(every_kind, 0)  # what was read does not depend on the file any more
    assert meta_read.keys() == meta.keys()
    assert [t[:3] for t in tensors_read.values()] == [t[:3] for t in tensors.values()]
    assert tensors_read["four.dims"].data.view("<f4").tolist() == list(range(120))
    files.release(tensors_read["four.dims"].data)
    assert not tensors_read["four.dims"].data.flags.writeable


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc/self/smaps")
def test_release_gives_pages_back(tmp_path):
    weights = np.random.default_rng(0).random(4 << 20, dtype=np.float32)
    path = save(tmp_path / "large.gguf", gb.model({}, {"small": weights[:5], "large": weights}))

    def resident() -> int:
        """KiB of the file that are in this process's memory."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(
            int(next(x for x in lines if x.startswith("Rss:")).split()[1]) for x in lines if str(path) in x
        )

    _, tensors = read(path)
    assert resident() < 6 << 10  # some systems map megabytes around a page that is touched
    assert np.array_equal(tensors["large"].data.view("<f4"), weights)
    assert resident() > 15 << 10
    files.release(tensors["small"].data)
    files.release(tensors["large"].data)
    assert resident() < 6 << 10
    assert np.array_equal(tensors["large"].data.view("<f4"), weights)
    files.release(np.zeros(10))  # not mapped: nothing happens


# Meaning

TOKENS = {"tokenizer.ggml.tokens": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"general.architecture": 3}, "found int, expected str"),
        (
            {"tokenizer.ggml.tokens": np.arange(3, dtype=np.float32)},
            "found array of float32, expected array of str",
        ),
        ({"tokenizer.ggml.merges": "a b"}, "found str, expected array of str"),
        (
            TOKENS | {"tokenizer.ggml.scores": np.zeros(3, np.uint8)},
            "found array of uint8, expected array of float32",
        ),
        (TOKENS | {"tokenizer.ggml.scores": np.zeros(2, np.float32)}, "found 2 values, expected 3"),
        (TOKENS | {"tokenizer.ggml.token_type": np.zeros(4, np.int32)}, "found 4 values, expected 3"),
        (TOKENS | {"tokenizer.ggml.eos_token_id": 3}, "found token 3, expected one below 3"),
        (TOKENS | {"tokenizer.ggml.eos_token_id": "2"}, "found str, expected a whole number"),
        (TOKENS | {"tokenizer.ggml.add_bos_token": np.array([True])}, "found array of bool, expected bool"),
    ],
)
def test_keys_that_several_rooms_rely_on(tmp_path, meta, message):
    with pytest.raises(FormatError, match=message):
        read(save(tmp_path / "m.gguf", gb.model(meta, {})))


@pytest.mark.parametrize(("format", "block"), [("f32", "<f"), ("q8_0", "<e32b")])
def test_check_finite(tmp_path, format, block):
    module = formats.get(format)
    sound, rotten = (struct.pack(block, x, *[1] * (struct.calcsize(block) > 4) * 32) for x in (1.5, np.nan))
    for blocks, row in (([sound] * 4, None), ([sound, sound, rotten, sound], 2)):
        data = b"".join(blocks)
        path = save(tmp_path / "m.gguf", gb.model({}, {"w": (module.GGML, (4, module.BLOCK), data)}))
        tensors = read(path)[1].values()
        if row is None:
            files.check_finite(path, tensors)
        else:
            with pytest.raises(FormatError, match=f"tensor w, row {row}: found nan"):
                files.check_finite(path, tensors)
