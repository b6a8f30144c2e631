"""Optimizers against their papers' formulas, examples against hand-made ones, runs that stop and go on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import CHATML, byte_tokenizer, ids_of
from folders import GOLDEN

from edgeq import files
from edgeq.errors import EdgeqError, FormatError
from edgeq.train import data, lora, optim
from edgeq.train.backend import Network
from edgeq.train.data import Example, Order
from edgeq.train.loop import Loop, Options, checkpoints


def test_adamw_is_its_formula():
    rng = np.random.default_rng(0)
    w = {"m": rng.standard_normal((2, 3)).astype("f4"), "v": np.ones(3, "f4")}
    expected = {k: a.astype(np.float64) for k, a in w.items()}
    m = {k: 0.0 for k in w}
    v = {k: 0.0 for k in w}
    adam = optim.AdamW(decay=0.1)
    for t in range(1, 6):
        g = {k: rng.standard_normal(a.shape).astype("f4") for k, a in w.items()}
        adam.step(w, g, 0.01)
        for k in w:
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.999 * v[k] + 0.001 * np.square(g[k], dtype=np.float64)
            step = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            decay = 0.1 if k == "m" else 0
            expected[k] = expected[k] * (1 - 0.01 * decay) - 0.01 * step
    for k in w:
        np.testing.assert_allclose(w[k], expected[k], rtol=1e-5)


def test_sgd_is_its_formula():
    w = {"w": np.ones((1, 2), "f4")}
    sgd = optim.SGD(momentum=0.5, decay=0.1)
    for _ in range(2):
        sgd.step(w, {"w": np.ones((1, 2), "f4")}, 0.1)
    np.testing.assert_allclose(w["w"], (0.99 - 0.1) * 0.99 - 0.15, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)])
def test_muon_takes_equal_steps_in_all_directions(shape):
    rng = np.random.default_rng(0)
    g = rng.standard_normal(shape).astype("f4")
    u, s, vt = np.linalg.svd(g.astype("f8"), full_matrices=False)
    s /= np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(optim.orthogonal(g), (u * s) @ vt, atol=1e-4)

    w = {"blk.0.attn_q.weight": np.ones(shape, "f4"), "token_embd.weight": np.ones(shape, "f4")}
    like_adam = {"token_embd.weight": np.ones(shape, "f4")}
    muon, adam = optim.Muon(decay=0.1), optim.AdamW(betas=(0.9, 0.95), decay=0.1)
    muon.step(w, dict.fromkeys(w, g), 0.01)
    adam.step(like_adam, dict.fromkeys(like_adam, g), 0.01)
    # momentum has no direction of its own yet
    expected = 1 - 0.01 * 0.1 - 0.01 * 0.2 * max(shape) ** 0.5 * ((u * s) @ vt)
    np.testing.assert_allclose(w["blk.0.attn_q.weight"], expected, atol=1e-6)
    np.testing.assert_array_equal(w["token_embd.weight"], like_adam["token_embd.weight"])


def test_rates_rise_and_fall():
    rates = [optim.rate(step, 10, 1.0, 2, 0.1) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)


def test_clipping_keeps_the_direction():
    g = {"a": np.array([3.0], "f4"), "b": np.array([[4.0]], "f4")}
    assert optim.clip(g, 1.0) == pytest.approx(5)
    assert g["a"][0] == pytest.approx(0.6)
    assert optim.clip(g, 2.0) == pytest.approx(1)
    assert g["b"][0, 0] == pytest.approx(0.8)


def jsonl(tmp_path, *entries):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
    return path


def test_a_text_is_cut_into_stretches_that_share_a_token(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("abcdefg")
    first, second = data.read(path, byte_tokenizer(), None, 4)
    assert first.ids.tolist() == ids_of("abcde")
    assert second.ids.tolist() == ids_of("efg")
    assert first.learned.tolist() == [False, True, True, True, True]


def test_of_prompt_and_completion_the_completion_and_its_end_are_learned(tmp_path):
    path = jsonl(tmp_path, {"prompt": "ab", "completion": "cd"})
    (example,) = data.read(path, byte_tokenizer(add_bos=True), None, 100)
    assert example.ids.tolist() == [1, *ids_of("abcd"), 2]
    assert example.learned.tolist() == [False, False, False, True, True, True]


def test_of_messages_what_the_assistant_says_is_learned(tmp_path):
    def say(role, content):
        return {"role": role, "content": content}

    talk = [say("user", "q"), say("assistant", "a"), say("user", "r"), say("assistant", "b")]
    (example,) = data.read(jsonl(tmp_path, {"messages": talk}), byte_tokenizer(), CHATML, 1000)
    text = byte_tokenizer().decode(example.ids[example.learned].tolist())
    assert text.replace("<|im_end|>", "") == "a\nb\n"
    assert (example.ids[example.learned] == 4).sum() == 2  # it says when it is done
    assert not example.learned[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[]", "found list"),
        ({"prompt": "a"}, "keys prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"messages": [3]}, "a list of objects"),
    ],
)
def test_lines_that_are_no_examples(tmp_path, line, message):
    with pytest.raises(FormatError, match=message):
        data.read(jsonl(tmp_path, line), byte_tokenizer(), CHATML, 100)


def test_an_epoch_shows_every_example_once_and_short_ones_are_filled_up():
    examples = [Example(np.arange(i, i + 3 + i), np.arange(3 + i) > 0) for i in range(4)]
    order = Order(examples, 2, seed=1)
    assert order.epoch == 2
    batches = [order.batch(i) for i in range(2)]
    assert sorted(row[0] for b in batches for row in b.ids) == [0, 1, 2, 3]
    assert sum(b.learned.sum() for b in batches) == sum(e.learned.sum() for e in examples)
    for b in batches:
        np.testing.assert_array_equal(b.targets[:, :-1][b.learned[:, 1:]], b.ids[:, 1:][b.learned[:, 1:]])
    orders = {tuple(Order(examples, 1, seed).batch(i).ids[0, 0] for i in range(4)) for seed in range(9)}
    assert len(orders) > 3


WITH_DROPOUT = lora.Settings(r=2, lora_dropout=0.1)


def loop(folder, *, settings=WITH_DROPOUT, name="qwen2", **options):
    path = GOLDEN / name
    network = Network(*files.read(path), path)
    rng = np.random.default_rng(5)
    examples = [Example(rng.integers(0, 128, n), np.arange(n) > 3) for n in (20, 30, 25, 30, 12)]
    chosen = Options(**{"steps": 6, "batch": 2, "accumulate": 2, "rate": 0.01, "save_every": 2, **options})
    learned, dropout = lora.attach(network, settings, chosen.seed)

    def begin(step, turn, batch):
        dropout.key = (step, turn)

    folder.mkdir(exist_ok=True)
    return Loop(network, learned, Order(examples, chosen.batch, 0), chosen, folder, begin=begin)


def same(a, b):
    for name, w in a.weights.items():
        np.testing.assert_array_equal(w, b.weights[name])
    assert [p[:5] for p in a.curve] == [p[:5] for p in b.curve]


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_a_run_that_stops_goes_on_to_the_bit(tmp_path, optimizer):
    whole = loop(tmp_path / "whole", optimizer=optimizer)
    whole.run()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "parts", optimizer=optimizer).run(saved=interrupt)
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["checkpoint-2"]
    rest = loop(tmp_path / "parts", optimizer=optimizer)
    assert rest.resume()
    assert len(rest.curve) == 2
    rest.run()
    same(whole, rest)
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["checkpoint-6"]


def test_training_learns_and_says_how_it_goes(tmp_path):
    run, told = loop(tmp_path, steps=40, rate=0.02), []
    run.run(lambda *news: told.append(news))
    losses = [p.loss for p in run.curve]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    stage, done, total, found = told[-1]
    assert (stage, done, total) == ("training", 40, 40)
    assert "loss" in found
    assert "tokens/s" in found
    run.write_curve(tmp_path / "loss.csv")
    rows = (tmp_path / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,loss,rate,norm,tokens,seconds"
    assert len(rows) == 41


def test_accumulated_batches_are_one_large_batch(tmp_path):
    still = lora.Settings(r=2)
    one = loop(tmp_path / "one", settings=still, batch=4, accumulate=1, optimizer="sgd", steps=1)
    two = loop(tmp_path / "two", settings=still, batch=2, accumulate=2, optimizer="sgd", steps=1)
    one.run()
    two.run()
    for name, w in one.weights.items():
        np.testing.assert_allclose(w, two.weights[name], atol=1e-6)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    loop(tmp_path, steps=2).run()
    with pytest.raises(EdgeqError, match="another rate"):
        loop(tmp_path, steps=2, rate=0.5).resume()
    other = loop(tmp_path, steps=2)
    other.order.examples = other.order.examples[1:]
    with pytest.raises(EdgeqError, match="another examples"):
        Loop(other.network, other.learned, other.order, other.options, tmp_path).resume()
    with pytest.raises(EdgeqError, match="another lora_alpha"):
        Loop(
            other.network,
            other.learned,
            loop(tmp_path, steps=2).order,
            other.options,
            tmp_path,
            about={"lora_alpha": 3},
        ).resume()
    with pytest.raises(EdgeqError, match="another model or adapter"):
        loop(tmp_path, steps=2, settings=lora.Settings(r=2, target_modules=("up_proj",))).resume()
    assert not loop(tmp_path / "new", steps=2).resume()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    run = loop(tmp_path)
    next(iter(run.weights.values()))[:] = np.nan
    with pytest.raises(EdgeqError, match="lower the rate"):
        run.run()


def test_options_out_of_range_are_refused():
    for wrong in ({"steps": 0}, {"batch": 0}, {"optimizer": "lion"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**{"steps": 1, **wrong})
    for wrong in ({"r": 0}, {"lora_dropout": 1.0}, {"bias": "some"}):
        with pytest.raises(ValueError, match="expected"):
            replace(lora.Settings(), **wrong)
