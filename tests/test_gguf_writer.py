"""GGUF, written: byte for byte what gguf-py writes, whole or not at all."""

import shutil
import signal
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeq import EdgeqError, files
from edgeq.cli import _console
from edgeq.files import gguf_writer
from edgeq.files.output import Entry

KINDS = gguf.GGUFValueType
NUMBERS = {
    **{KINDS.UINT8: np.uint8(255), KINDS.INT8: np.int8(-128), KINDS.UINT16: np.uint16(65535)},
    **{KINDS.INT16: np.int16(-32768), KINDS.UINT32: np.uint32(2**32 - 1), KINDS.INT32: np.int32(-(2**31))},
    **{KINDS.UINT64: np.uint64(2**64 - 1), KINDS.INT64: np.int64(-(2**63)), KINDS.FLOAT32: np.float32(1e-5)},
    **{KINDS.FLOAT64: np.float64(1e-300), KINDS.BOOL: np.bool_(True)},
}


def entry(name: str, array: np.ndarray) -> Entry:
    """A tensor that comes in two pieces."""
    data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return Entry(name, 0, array.shape, data.size, lambda: iter([data[:5], data[5:]]))


def theirs(path: Path, keys, tensors, alignment: int | None = None) -> bytes:
    """The file that gguf-py writes; `keys` calls its methods."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    keys(writer)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


TENSORS = {
    "a.weight": np.arange(21, dtype=np.float32).reshape(3, 7),
    "b": np.arange(5, dtype=np.float32),
    "c.weight": np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2),
}


@pytest.mark.parametrize("alignment", [None, 64])
def test_bytes_are_those_of_gguf_py(tmp_path, alignment):
    meta = {"general.architecture": "llama"}
    if alignment:
        meta["general.alignment"] = alignment
    for kind, number in NUMBERS.items():
        meta[f"test.{kind.name}"] = number
        meta[f"test.array.{kind.name}"] = np.array([number, 0, number], number.dtype)
    meta |= {"test.text": "naïve “text” 🦙\n", "test.texts": ["", "a", "Ġthe"], "test.flag": False}
    meta |= {"test.int": 7, "test.negative": -7, "test.large": 2**40, "test.float": 0.5}

    def keys(writer):
        for kind, number in NUMBERS.items():
            value = number.item()
            writer.add_key_value(f"test.{kind.name}", value, kind)
            zero = type(value)(0)
            writer.add_key_value(f"test.array.{kind.name}", [value, zero, value], KINDS.ARRAY, kind)
        writer.add_string("test.text", "naïve “text” 🦙\n")
        writer.add_array("test.texts", ["", "a", "Ġthe"])
        writer.add_bool("test.flag", False)
        writer.add_uint32("test.int", 7)
        writer.add_int32("test.negative", -7)
        writer.add_uint64("test.large", 2**40)
        writer.add_float32("test.float", 0.5)

    made = [entry(name, array) for name, array in TENSORS.items()]
    mine = tmp_path / "mine.gguf"
    assert gguf_writer.write(mine, meta, made) == [mine]
    assert mine.read_bytes() == theirs(tmp_path / "theirs.gguf", keys, TENSORS, alignment)

    again, tensors = files.gguf.read_exact(mine)
    copied = [Entry(t.name, 0, t.shape, t.nbytes, partial(iter, [t.data])) for t in tensors.values()]
    gguf_writer.write(tmp_path / "again.gguf", again, copied)
    assert (tmp_path / "again.gguf").read_bytes() == mine.read_bytes()


def test_arrays_of_arrays_and_empty_ones(tmp_path):
    meta = {"nested": [np.array([1, 2], np.int32), np.array([3], np.int32)], "texts": [["a"], ["b", "c"]]}
    gguf_writer.write(tmp_path / "a.gguf", meta | {"matrix": np.eye(2, dtype=np.float32)}, [])
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    parts = {key: [fields[key].parts[i] for i in fields[key].data] for key in (*meta, "matrix")}
    assert [n.item() for n in parts["nested"]] == [1, 2, 3]
    assert [bytes(t) for t in parts["texts"]] == [b"a", b"b", b"c"]
    assert [n.item() for n in parts["matrix"]] == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="neither texts nor arrays"):
        gguf_writer.write(tmp_path / "c.gguf", {"mixed": ["a", 1]}, [])
    gguf_writer.write(tmp_path / "b.gguf", {"general.architecture": "llama", "none": []}, [])
    assert files.read(tmp_path / "b.gguf")[0]["none"] == []


def test_parts(tmp_path):
    made = [entry(name, array) for name, array in TENSORS.items()]  # 84, 20 and 192 bytes
    meta = {"general.architecture": "llama", "general.alignment": 64}
    paths = gguf_writer.write(tmp_path / "model.gguf", meta, made, max_size=200)
    assert [p.name for p in paths] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    first, second = map(gguf.GGUFReader, paths)
    assert [t.name for t in first.tensors] == ["a.weight", "b"]
    assert [t.name for t in second.tensors] == ["c.weight"]
    for i, reader in enumerate((first, second)):
        split = {key: (f.types, f.contents()) for key, f in reader.fields.items() if key.startswith("split.")}
        assert split == {
            "split.no": ([KINDS.UINT16], i),
            "split.count": ([KINDS.UINT16], 2),
            "split.tensors.count": ([KINDS.INT32], 3),
        }
    assert "general.architecture" not in second.fields
    read, tensors = files.read(paths[1])
    assert read == meta
    for name, array in TENSORS.items():
        assert tensors[name].data.tobytes() == array.tobytes()
    with pytest.raises(EdgeqError, match="too small: tensor a.weight alone has 96"):
        gguf_writer.write(tmp_path / "model.gguf", meta | {"general.alignment": 32}, made, max_size=90)
    one = gguf_writer.write(tmp_path / "one.gguf", meta, made, max_size=400)
    assert [p.name for p in one] == ["one.gguf"]


def failing(error: BaseException) -> Entry:
    """A tensor of which only a part comes."""

    def pieces():
        yield np.zeros(8, np.uint8)
        raise error

    return Entry("late", 0, (4,), 16, pieces)


@pytest.mark.parametrize("error", [EdgeqError("no"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("max_size", [None, 96])
def test_what_fails_leaves_nothing_behind(tmp_path, error, max_size):
    (tmp_path / "model.gguf").write_bytes(b"what was there before")
    made = [entry("a", TENSORS["a.weight"]), failing(error)]
    with pytest.raises(type(error)):
        gguf_writer.write(tmp_path / "model.gguf", {}, made, max_size=max_size)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == b"what was there before"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(EdgeqError, match=r"nowhere is no folder: x\.gguf would be written there"):
        gguf_writer.write(tmp_path / "nowhere" / "x.gguf", {}, [])


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(EdgeqError, match="16 MiB free, 17 MiB are needed|16 MiB free, 16 MiB are needed"):
        gguf_writer.write(tmp_path / "model.gguf", {}, [failing(AssertionError("not asked"))])
    assert not any(tmp_path.iterdir())


def test_what_gguf_has_no_room_for(tmp_path):
    for name, shape in (("x" * 64, (1,)), ("x", (1, 1, 1, 1, 1))):
        with pytest.raises(EdgeqError, match="no room"):
            gguf_writer.write(tmp_path / "m.gguf", {}, [Entry(name, 0, shape, 4, lambda: iter(()))])


def test_progress_counts_the_bytes_of_tensors(tmp_path):
    seen = []
    made = [entry(name, array) for name, array in TENSORS.items()]
    gguf_writer.write(tmp_path / "model.gguf", {}, made, progress=lambda *step: seen.append(step))
    assert seen[0] == ("writing", 5, 296)
    assert seen[-1] == ("writing", 296, 296)


def test_signals_end_a_writer_like_errors(tmp_path):
    def pieces():
        yield np.zeros(8, np.uint8)
        signal.raise_signal(signal.SIGTERM)
        yield np.zeros(8, np.uint8)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, _console.orderly():
        gguf_writer.write(tmp_path / "model.gguf", {}, [Entry("a", 0, (4,), 16, pieces)])
    assert ended.value.code == 143
    assert not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler
