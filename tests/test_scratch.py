"""Models from nothing: their vocabulary, their first weights, and the text that they read."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeq import arch, tokenizer
from edgeq.files import gguf, gguf_writer
from edgeq.train import scratch, tape
from edgeq.train.adapter import entry
from edgeq.train.backend import Network
from edgeq.train.loop import Loop, Options, mean_loss

TEXTS = [
    f"Once there was a {a} {b}. The {b} was {a}, and it didn't stop."
    for a in ("red", "big", "sad", "tall")
    for b in ("dog", "cat", "house", "Lily")
]
SHAPE = scratch.Shape(layers=2, dim=32, ffn=48, heads=4, kv_heads=2, context=64)
VOCAB = 300


@pytest.fixture(scope="module")
def meta():
    return scratch.metadata(SHAPE, scratch.vocabulary(TEXTS, VOCAB))


def network(meta):
    return Network(meta, scratch.tensors(SHAPE, VOCAB, 0), trained=lambda name: True)


def test_the_vocabulary_is_one_that_the_library_reads_alike(meta):
    key = "tokenizer.ggml."
    ids = {token: i for i, token in enumerate(meta[key + "tokens"])}
    assert len(ids) == VOCAB
    library = Tokenizer(models.BPE(ids, [tuple(pair.split(" ")) for pair in meta[key + "merges"]]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    words = tokenizer.from_gguf(meta)
    for text in (*TEXTS[:3], "  naïve\n\n été — 12345 🙂", ""):
        encoded = words.encode(text)
        assert encoded == [ids[scratch.END], *library.encode(text).ids]
        assert words.decode(encoded[1:]) == library.decode(encoded[1:]) == text
    assert words.eog_ids == {ids[scratch.END]}
    assert len(words.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_a_new_model_knows_nothing_and_is_read_as_any_other(meta, tmp_path):
    net, ids = network(meta), np.arange(48)
    logits = tape.value(net.head(net.hidden(ids[None])))
    nats = tape.cross_entropy(logits, ids, np.full(48, 1 / 48, np.float32))
    assert abs(float(nats) - np.log(VOCAB)) < 0.2
    path = tmp_path / "new.gguf"
    gguf_writer.write(path, meta, [entry(n, 0, v.value) for n, v in net.parameters.items()])
    model = arch.load(*gguf.read(path), backend="numpy")
    assert abs(model(ids, model.new_cache(64), "all") - logits).max() < 1e-4


def test_stretches_come_from_all_over_the_text():
    ids = np.arange(1000)
    order = scratch.Stretches(ids, 4, 16, seed=1)
    batch = order.batch(7)
    assert batch.ids.shape == (4, 16)
    assert (np.diff(batch.ids) == 1).all()
    assert (batch.targets == batch.ids + 1).all()
    assert (batch.ids == order.batch(7).ids).all()
    starts = np.concatenate([order.batch(i).ids[:, 0] for i in range(500)])
    assert starts.min() == 0
    assert starts.max() == 1000 - 16 - 1
    assert order.fingerprint() != scratch.Stretches(ids[::-1], 4, 16, seed=1).fingerprint()


def test_it_learns(meta, tmp_path):
    words = tokenizer.from_gguf(meta)
    ids = np.array([id for text in TEXTS for id in words.encode(text)])
    net = network(meta)
    before = mean_loss(net, ids[:129], 32)
    pieces = [net.head(net.hidden(ids[None, at : at + 32])) for at in range(0, 128, 32)]
    logits = np.concatenate([tape.value(p) for p in pieces]).astype(np.float64)
    likely = logits[np.arange(128), ids[1:129]] - np.log(np.exp(logits).sum(axis=1))
    assert before == pytest.approx(-likely.mean(), abs=1e-5)
    order = scratch.Stretches(ids, 4, 32, seed=0)
    Loop(net, net.parameters, order, Options(steps=40, batch=4, rate=0.01), tmp_path).run()
    assert mean_loss(net, ids[:129], 32) < before / 2
