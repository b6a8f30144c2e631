"""verify and diff: on sound files, and on files with one thing wrong each."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf_bytes
import numpy as np
import pytest
from folders import complete
from gguf import GGUFReader

from edgeq import arch, catalog, cli, files, formats, quantizers
from edgeq.errors import FormatError
from edgeq.evaluate.audit import Audit, audit, explained
from edgeq.evaluate.difference import Difference, difference
from edgeq.evaluate.distance import Distance, distance
from edgeq.evaluate.health import Health, health
from edgeq.tensor import Tensor

RNG = np.random.default_rng(0)


def tensor(w: np.ndarray, format: str = "f32") -> Tensor:
    return formats.quantize(format, w.astype(np.float32))._replace(name="w")


# Distance


def test_distance_by_hand() -> None:
    w, o = np.array([[3.0, 0], [0, 4]]), np.array([[4.0, 0], [0, 2]])
    far = distance(tensor(w), tensor(o))
    assert far == pytest.approx((math.sqrt(5 / 20), 2, 20 / math.sqrt(25 * 20)))
    assert far.sqnr == pytest.approx(10 * math.log10(20 / 5))
    assert distance(tensor(o), tensor(o)) == pytest.approx((0, 0, 1))
    assert distance(tensor(o), tensor(o)).sqnr == math.inf


def test_distance_of_nothing() -> None:
    zero, one = tensor(np.zeros((2, 2))), tensor(np.ones((2, 2)))
    assert distance(zero, zero)[:2] == (0, 0)
    assert distance(one, zero).relative == math.inf
    assert distance(zero, one).relative == 1
    assert math.isnan(distance(zero, one).cosine)
    broken = one._replace(data=np.array([1, math.nan, math.inf, 1], np.float32).view(np.uint8))
    assert all(map(math.isnan, distance(broken, one)))


def test_distance_panel_by_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    w, o = RNG.normal(size=(2, 7, 32))
    order = RNG.permutation(7)
    whole = distance(tensor(w), tensor(o), order)
    monkeypatch.setattr("edgeq.evaluate.distance.PANEL", 64)
    assert distance(tensor(w), tensor(o), order) == pytest.approx(whole)
    w = w[order]
    assert whole.relative == pytest.approx(np.linalg.norm(w - o) / np.linalg.norm(o))
    assert whole.maximum == pytest.approx(np.abs(w - o).max())
    assert whole.cosine == pytest.approx((w * o).sum() / np.linalg.norm(w) / np.linalg.norm(o))


# Health


@pytest.mark.parametrize("name", formats.names())
def test_ordinary_weights_are_healthy_in_every_format(name: str) -> None:
    w = RNG.standard_t(5, size=(8, 512)).astype(np.float32)
    made = tensor(w, name)
    state = health(made)
    assert (state.not_finite, state.dead, state.saturated) == (0, 0, 0)
    assert state.groups >= 8
    assert distance(made, tensor(w)).relative < explained(made)


def test_groups_are_counted() -> None:
    w = RNG.normal(size=(4, 64)).astype(np.float32)
    w[1, :32] = 0  # dead
    w[3] = 2  # two more, whose codes are all the same
    assert health(tensor(w, "q4_0")) == Health(8, 0, 3, 0)
    assert health(tensor(w)) == Health(4, 0, 1, 0)
    assert health(tensor(w[3])) == Health(0, 0, 0, 0)  # a vector of twos is no illness


def test_broken_numbers_are_counted() -> None:
    made = tensor(RNG.normal(size=(4, 64)), "q4_1")
    blocks = made.data.reshape(-1, 20)
    blocks[2, :2] = blocks[5, 2:4] = [0, 0x7E]  # NaN: a scale, an offset
    blocks[6, :2] = [0, 0x7C]  # infinity
    assert health(made).not_finite == 3
    halves = np.array([1, math.nan, math.inf, -math.inf], np.float16).view(np.uint8)
    assert health(Tensor("w", "f16", (1, 4), halves)).not_finite == 3


def test_a_scale_that_is_too_small_saturates() -> None:
    w = RNG.normal(size=(4, 64)).astype(np.float32)
    grid = formats.fit("q4_0", w)
    assert grid is not None
    grid.scale[1] *= np.float16(0.1)
    made = formats.pack("q4_0", formats.encode(w, grid), grid)
    assert health(made) == Health(8, 0, 0, 2)


# Verdicts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return complete("llama", tmp_path / "folder")


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """The folder's model as Q8_0."""
    return quantizers.quantize(folder, tmp_path / "model.gguf", "q8_0")[0]


def edited(file: Path, name: str, at: int, data: bytes) -> Path:
    """A copy with other bytes in a tensor, found with gguf-py."""
    offset = next(t.data_offset for t in GGUFReader(file).tensors if t.name == name)
    raw = bytearray(file.read_bytes())
    raw[offset + at : offset + at + len(data)] = data
    (made := file.with_name("edited.gguf")).write_bytes(raw)
    return made


def told(found: Audit) -> str:
    return "\n".join([*found.problems, *found.far])


@pytest.mark.parametrize("name", arch.names())
def test_every_architecture_s_files_are_sound(name: str, tmp_path: Path) -> None:
    folder = complete(
        name, tmp_path / "folder", **({"query_pre_attn_scalar": 16} if name == "gemma3" else {})
    )
    (file,) = quantizers.quantize(folder, tmp_path / "model.gguf", "q4_1")
    for path, original in ((folder, None), (file, None), (file, folder)):
        found = audit(path, original)
        assert found.sound, told(found)
        assert not found.remarks
    errors = {f.distance.relative for f in found.findings.values() if f.distance}
    assert len(found.findings) == len(files.read(file)[1])
    assert min(errors) == 0 < max(errors) < 0.2


def test_hashes(file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert audit(file).files == [("model.gguf", file.stat().st_size, digest)]
    assert audit(file, sha256=digest.upper()).sound
    assert "sha256 is not 00" in told(audit(file, sha256="00"))


def test_all_parts_of_a_split_model(folder: Path, tmp_path: Path) -> None:
    parts = quantizers.quantize(folder, tmp_path / "split.gguf", "f16", max_size=40_000)
    assert len(parts) > 1
    found = audit(parts[1])
    assert [f.name for f in found.files] == [p.name for p in parts]
    assert found.sound
    parts[0].unlink()
    assert "expected all" in told(audit(parts[1]))


def test_damaged_files(file: Path, folder: Path) -> None:
    name = "blk.0.ffn_up.weight"
    nan = edited(file, name, 34 * 7, b"\x00\x7e")
    assert told(audit(nan, folder)) == f"{name}: 1 numbers are not finite"
    nbytes = files.read(file)[1][name].nbytes
    empty = edited(file, name, nbytes // 2, bytes(nbytes - nbytes // 2))
    assert f"{name}: {nbytes // 68:,} of {nbytes // 34:,} groups are dead" in told(audit(empty))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert "beyond the end" in told(audit(file)) or "expected" in told(audit(file))
    file.write_bytes(b"")
    assert "an empty file" in told(audit(file))


def test_another_model_s_weights(file: Path, folder: Path) -> None:
    tensors = files.read(file)[1]
    q, other = (f"blk.{i}.attn_q.weight" for i in (0, 1))
    swapped = edited(file, q, 0, tensors[other].data.tobytes())
    assert audit(swapped).sound
    found = audit(swapped, folder)
    assert told(found).startswith(f"{q}: ")
    assert "from the original, rounding to q8_0 explains 2.82 %" in told(found)
    assert found.findings[q].distance.relative > 1


def test_rows_in_another_order_are_told(file: Path, folder: Path) -> None:
    name = "blk.0.attn_q.weight"  # in GGUF files its rows are interleaved
    t = files.read(file)[1][name]
    rows = t.data.reshape(t.rows, -1)
    found = audit(edited(file, name, 0, np.concatenate([rows[::2], rows[1::2]]).tobytes()), folder)
    assert [p.split(":")[0] for p in found.far] == [name]


def written(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    encoded = {k: (formats.get(t.format).GGML, t.shape, t.data.tobytes()) for k, t in tensors.items()}
    path.write_bytes(gguf_bytes.model(meta, encoded))
    return path


def test_incomplete_models(file: Path, folder: Path, tmp_path: Path) -> None:
    meta, tensors = files.read(file)
    name = "blk.1.ffn_down.weight"
    less = {k: t for k, t in tensors.items() if k != name}
    found = audit(written(tmp_path / "less.gguf", meta, less), folder)
    assert f"tensor {name}: found nothing" in found.problems[0]
    assert found.problems[1:] == [f"{name}: the original has it, this model does not"]
    more = tensors | {"blk.9.ffn_down.weight": tensors[name]}
    found = audit(written(tmp_path / "more.gguf", meta, more), folder)
    assert found.sound
    assert found.remarks == ["blk.9.ffn_down.weight: the original has no such tensor"]
    found = audit(written(tmp_path / "words.gguf", meta, {}))
    assert found.sound
    assert found.remarks == ["it holds no tensors"]
    strange = meta | {"general.architecture": "mamba"}
    found = audit(written(tmp_path / "mamba.gguf", strange, tensors))
    assert found.sound
    assert "'mamba'" in found.remarks[0]


def test_a_vocabulary_beyond_the_embedding(file: Path, tmp_path: Path) -> None:
    meta, tensors = files.read(file)
    meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"], "more"]
    meta["tokenizer.ggml.token_type"] = np.append(meta["tokenizer.ggml.token_type"], np.int32(1))
    found = audit(written(tmp_path / "words.gguf", meta, tensors))
    assert "the vocabulary has 129 tokens, the embedding 128 rows" in found.problems


def test_the_original_has_to_be_sound(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    with pytest.raises(FormatError, match="expected a GGUF file"):
        audit(file, tmp_path / "text")


def test_a_tied_output_matrix_is_compared_with_the_embedding(tmp_path: Path) -> None:
    folder = complete("llama", tmp_path / "folder", tie_word_embeddings=True)
    (file,) = quantizers.quantize(folder, tmp_path / "model.gguf", "f16")
    meta, tensors = files.read(file)
    tensors.pop("output.weight", None)
    tied = written(tmp_path / "tied.gguf", meta, tensors)
    both = written(tmp_path / "both.gguf", meta, tensors | {"output.weight": tensors["token_embd.weight"]})
    found = audit(both, tied)
    assert found.sound
    assert found.findings["output.weight"].distance == pytest.approx(Distance(0, 0, 1))


@pytest.mark.model
def test_real_models_are_sound(smollm2_path: Path) -> None:
    found = audit(smollm2_path)
    assert found.sound
    assert found.files[0].sha256 == catalog.entries()["smollm2"].sha256
    assert not found.remarks


# Differences


def test_a_model_is_no_different_from_itself(file: Path, folder: Path, tmp_path: Path) -> None:
    count = len(files.read(file)[1])
    assert difference(file, file) == Difference([], [], count)
    assert difference(folder, folder) == Difference([], [], count)
    (same,) = quantizers.quantize(folder, tmp_path / "f32.gguf", "f32")
    found = difference(folder, same)
    assert not found.tensors
    assert found.same == count
    assert {e.key for e in found.metadata} == {"general.file_type", "general.quantization_version"}


def test_differences(file: Path, folder: Path, tmp_path: Path) -> None:
    meta, tensors = files.read(file)
    name, other = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    changed = dict(tensors)
    del changed[other]
    w = formats.dequantize(tensors[name])
    changed[name] = formats.quantize("q4_0", w)
    changed["blk.1.ffn_up.weight"] = formats.quantize("q8_0", np.zeros((4, 64), np.float32))
    metas = dict(meta) | {"general.name": "other", "general.author": "me", "general.type": 3}
    del metas["llama.block_count"]
    one = written(tmp_path / "one.gguf", meta, tensors)
    two = written(tmp_path / "two.gguf", metas, changed)
    found = difference(one, two)
    assert {e.key for e in found.metadata} == {
        "general.name", "general.author", "general.type", "llama.block_count",
    }  # fmt: skip
    changes = {c.name: c for c in found.tensors}
    assert set(changes) == {name, other, "blk.1.ffn_up.weight"}
    assert changes[other].b is None
    assert changes["blk.1.ffn_up.weight"].distance is None  # of another shape
    v = formats.dequantize(changed[name])
    assert changes[name].distance.relative == pytest.approx(np.linalg.norm(v - w) / np.linalg.norm(w))
    assert found.same == len(tensors) - 3


def test_types_of_numbers_are_compared(file: Path, tmp_path: Path) -> None:
    meta, tensors = files.read(file)
    one = written(tmp_path / "one.gguf", meta, tensors)
    raw = one.read_bytes()
    key = gguf_bytes.key("llama.block_count", gguf_bytes.U32, meta["llama.block_count"])
    assert raw.count(key) == 1
    signed = gguf_bytes.key("llama.block_count", gguf_bytes.I32, meta["llama.block_count"])
    (tmp_path / "two.gguf").write_bytes(raw.replace(key, signed))
    (entry,) = difference(one, tmp_path / "two.gguf").metadata
    assert entry.key == "llama.block_count"


# The commands


def run(*words: object) -> int:
    return cli.edgeq.main(list(map(str, words)), standalone_mode=False)


Capture = pytest.CaptureFixture[str]


def test_verify(file: Path, folder: Path, capsys: Capture) -> None:
    assert not run("verify", file)
    out = capsys.readouterr().out
    assert hashlib.sha256(file.read_bytes()).hexdigest() in out
    assert out.splitlines()[-1] == "sound"
    assert "ERROR" not in out
    assert not run("verify", file, "--against", folder)
    assert "WORST" in capsys.readouterr().out
    assert not run("verify", file, "--against", folder, "--full")
    assert capsys.readouterr().out.count("blk.") == len(files.read(file)[1]) - 3
    bad = edited(file, "blk.0.ffn_up.weight", 0, b"\x00\x7e")
    assert run("verify", bad) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "NOT SOUND: 1 problem"


def test_verify_for_programs(file: Path, folder: Path, capsys: Capture) -> None:
    assert not run("verify", file, "--json", "--against", folder)
    found = json.loads(capsys.readouterr().out)
    expected = audit(file, folder)
    assert found["sound"]
    assert found["bytes"] == file.stat().st_size
    tensors = files.read(file)[1]
    weights = sum(math.prod(t.shape) for t in tensors.values())
    assert found["parameters"] == weights
    assert found["bits_per_weight"] == 8 * sum(t.nbytes for t in tensors.values()) / weights
    rows = {row["name"]: row for row in found["tensors"]}
    for name, finding in expected.findings.items():
        assert rows[name]["relative_error"] == finding.distance.relative
        assert rows[name]["format"] == tensors[name].format
    file.write_text("text")
    assert run("verify", file, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["sound"]
    assert "found text" in found["problems"][0]


def test_many_problems_are_cut(file: Path, tmp_path: Path, capsys: Capture) -> None:
    other = complete("qwen3", tmp_path / "other")
    assert run("verify", file, "--against", other) == 1
    out, err = capsys.readouterr()
    assert out.count("problem: ") == 10
    assert "more problems: --full shows all" in err


def test_diff(file: Path, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert not run("diff", file, file)
    out, err = capsys.readouterr()
    assert out == ""
    assert "no difference" in err
    (other,) = quantizers.quantize(folder, tmp_path / "other.gguf", "q4_0")
    assert run("diff", file, other) == 1
    out, err = capsys.readouterr()
    assert "- general.file_type: 7\n+ general.file_type: 2\n" in out
    assert "blk.1.attn_v.weight" in out
    assert err.startswith("1 keys and")


def test_diff_of_long_values(file: Path, tmp_path: Path, capsys: Capture) -> None:
    meta, tensors = files.read(file)
    one = written(tmp_path / "one.gguf", meta, tensors)
    words = [*meta["tokenizer.ggml.tokens"]]
    words[100] = "other"
    two = written(tmp_path / "two.gguf", meta | {"tokenizer.ggml.tokens": words}, tensors)
    assert run("diff", one, two) == 1
    assert '128 entries, at 100: ["other", ' in capsys.readouterr().out


def test_diff_for_programs(file: Path, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (other,) = quantizers.quantize(folder, tmp_path / "other.gguf", "q4_0")
    assert run("diff", file, other, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert found["metadata"] == [{"key": "general.file_type", "a": 7, "b": 2}]
    row = next(r for r in found["tensors"] if r["name"] == "blk.0.ffn_up.weight")
    assert (row["a"]["format"], row["b"]["format"]) == ("q8_0", "q4_0")
    assert 0 < row["relative_error"] < 0.2


def test_trouble_of_diff_has_its_own_status(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (file.parent / "text").write_text("text")
    for words in (["text"], ["nothing/there.gguf"]):
        monkeypatch.chdir(file.parent)
        monkeypatch.setattr("sys.argv", ["edgeq", "diff", str(file), *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_changes_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert not difference(folder, tmp_path / "copy")
