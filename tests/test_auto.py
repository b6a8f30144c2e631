"""A type for each tensor: the best of all in small cases, within the size, and files that run."""

from itertools import product

import numpy as np
import pytest
from click.testing import CliRunner
from folders import complete

import edgeq
from edgeq import cli, files, quantizers
from edgeq.quantizers.auto import Choice, choose, hull
from edgeq.quantizers.layerwise import Calibration

TEXT = "the 12 cats of 345 and the dog's tail. Then they went home, all of them! " * 40
QUICK = Calibration(TEXT, chunks=4, ctx=32, backend="numpy")


def made_up(seed, matrices=4, types=4):
    rng = np.random.default_rng(seed)
    return {
        f"t{m}": [
            Choice(f"f{i}", int(rng.integers(10, 100)), float(rng.random())) for i in range(types)
        ]
        for m in range(matrices)
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_that_size_or_less_has_less_error(seed):
    """At every size that the walk along the hulls reaches with all moves up to there."""
    choices = made_up(seed)
    total = {"bytes": 0.0, "error": 0.0}
    hulls = {name: hull(of) for name, of in choices.items()}
    prices = sorted(
        (a.error - b.error) / (b.nbytes - a.nbytes)
        for of in hulls.values()
        for a, b in zip(of, of[1:], strict=False)
    )
    for price in prices:
        alone = {
            name: min(of, key=lambda c: c.error + 0.999 * price * c.nbytes) for name, of in choices.items()
        }
        room = sum(c.nbytes for c in alone.values())
        picked = choose(choices, room)
        found = [next(c for c in choices[name] if c.type == type) for name, type in picked.items()]
        total["bytes"], total["error"] = sum(c.nbytes for c in found), sum(c.error for c in found)
        assert total["bytes"] <= room
        least = min(
            sum(c.error for c in every)
            for every in product(*choices.values())
            if sum(c.nbytes for c in every) <= room
        )
        assert total["error"] == pytest.approx(least)


def test_the_hull():
    points = [
        Choice(*c) for c in (("a", 10, 9.0), ("b", 20, 8.0), ("c", 30, 2.0), ("d", 40, 3.0), ("e", 50, 1.0))
    ]
    assert [c.type for c in hull(points)] == ["a", "c", "e"]
    with pytest.raises(ValueError, match="the smallest types take 10 bytes, more than 9"):
        choose({"t": points}, 9)


@pytest.mark.parametrize("folder", ["llama"])
def test_files_of_so_many_bits(folder, tmp_path):
    folder = complete(folder, tmp_path / folder)
    sizes, errors = [], []
    for bits in (5.5, 6.5, 8.4):
        plan = quantizers.automatic(folder, bits, QUICK)
        quantizers.write(plan, tmp_path / "out.gguf")
        _, tensors = files.read(tmp_path / "out.gguf")
        assert len({t.format for n, t in tensors.items() if n.startswith("blk.")}) > 1
        sizes.append(
            8 * sum(t.nbytes for t in tensors.values()) / sum(np.prod(t.shape) for t in tensors.values())
        )
        assert bits - 0.6 < sizes[-1] <= bits
        with (
            edgeq.load(tmp_path / "out.gguf", backend="numpy") as a,
            edgeq.load(folder, backend="numpy") as b,
        ):
            errors.append(np.abs(a.logits([1, 2, 3]) - b.logits([1, 2, 3])).mean())
    assert errors[2] < errors[0]
    with pytest.raises(ValueError, match="smallest types"):
        quantizers.automatic(folder, 1.0, QUICK)


def test_command(tmp_path):
    folder = complete("llama", tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["quantize", folder, tmp_path / "out.gguf", "--auto", 6, "--method", "gptq"]
    words += ["--calibration", tmp_path / "text.txt", "--chunks", 4, "-c", 32]
    done = CliRunner().invoke(cli.edgeq, list(map(str, words)), catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out.gguf'}\n")
    done = CliRunner().invoke(cli.edgeq, list(map(str, [*words, "q4_0"])), catch_exceptions=False)
    assert done.exit_code == 2
    done = CliRunner().invoke(cli.edgeq, [*map(str, words), "--dry-run"], catch_exceptions=False)
    assert "attn_output" in done.stdout
