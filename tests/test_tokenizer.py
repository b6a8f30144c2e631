"""Tokenizers: llama.cpp's ids on its own test inputs and on ours, SentencePiece's on a model of its own.

golden/tokens.json has ids of hard texts and says who made them; ../shared/data has vocabularies of llama.cpp.
"""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeq import tokenizer
from edgeq.errors import FormatError
from edgeq.tokenizer import bpe, special, spm

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokens.json").read_text(encoding="utf-8"))
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
SEPARATOR = "\n__ggml_vocab_test__\n"


def gguf(changes, **values):
    """GGUF metadata of a vocabulary, with changes."""
    values = {key: value for key, value in (values | changes).items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def bpe_meta(**changes):
    """Every byte, four merges, an ordinary token, BOS and end of turn."""
    merges = ["h e", "l l", "he ll", "Ġ hell"]
    made = [merge.replace(" ", "") for merge in merges]
    tokens = [*ALPHABET, *made, "<tag>", "<s>", "<|im_end|>"]
    kinds = np.array([1] * 260 + [4, 3, 3], np.int32)
    ids = {"bos_token_id": 261, "eos_token_id": 262}
    return gguf(changes, model="gpt2", pre="gpt-2", tokens=tokens, token_type=kinds, merges=merges, **ids)


def spm_meta(**changes):
    """Every byte, a few letters and their unions with scores, two kinds of special tokens."""
    scores = {
        "▁": -9,
        "h": -9,
        "e": -9,
        "l": -9,
        "o": -9,
        "he": -1,
        "lo": -2,
        "ll": -3,
        "hell": -4,
        "▁he": -5,
    }
    scores |= {"a": -9, "aa": -2, "aaa": -3, "aaaa": -1, "▁▁": -6}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *scores, "<tag>"]
    kinds = np.array([2, 3, 3, *[6] * 256, *[1] * len(scores), 4], np.int32)
    values = np.array([0] * 259 + list(scores.values()) + [0], np.float32)
    return gguf(changes, model="llama", tokens=tokens, token_type=kinds, scores=values)


BPE, SPM = tokenizer.from_gguf(bpe_meta()), tokenizer.from_gguf(spm_meta())


def pieces(words, text, **options):
    return [words.token(id) for id in words.encode(text, **options)]


# llama.cpp's answers


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"])
def test_vocabularies_of_llama_cpp(shared, name):
    path = shared / "data" / "vocab" / f"ggml-vocab-{name}.gguf"
    words = tokenizer.load(path)
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)[:-1]
    lines = Path(f"{path}.out").read_text().splitlines()
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        ids = list(map(int, line.split()))
        assert words.encode(text, add_special=False) == ids
        assert words.decode(ids) == text


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_goldens(name, request):
    words = tokenizer.load(request.getfixturevalue(f"{name}_path"))
    for i, text in enumerate(GOLDEN["texts"]):
        assert words.encode(text, add_special=False) == GOLDEN[name]["plain"][i]
        assert words.encode(text, add_special=False, parse_special=True) == GOLDEN[name]["special"][i]
        if "▁" not in text:  # which Gemma cannot tell from a space
            assert words.decode(GOLDEN[name]["plain"][i]) == text
            assert words.decode(GOLDEN[name]["special"][i], special=True) == text


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_of_the_shared_goldens(name, request, shared):
    words = tokenizer.load(request.getfixturevalue(f"{name}_path"))
    for case in json.loads((shared / "data" / "golden" / f"{name}.json").read_text())["cases"]:
        assert words.encode(case["prompt"], parse_special=True) == case["ids"]
        assert words.decode(case["greedy"]) == case["greedy_text"]


@pytest.mark.model
def test_special_tokens_of_real_models(smollm2_path, gemma3_path):
    words = tokenizer.load(smollm2_path)
    assert (words.bos_id, words.eos_id, words.add_bos, words.vocab_size) == (1, 2, False, 49152)
    assert {words.token(id) for id in words.eog_ids} == {"<|im_end|>", "<|endoftext|>", "<reponame>"}
    assert "<|im_start|>system" in words.chat_template
    words = tokenizer.load(gemma3_path)
    assert (words.bos_id, words.eos_id, words.add_bos, words.vocab_size) == (2, 1, True, 262144)
    assert {words.token(id) for id in words.eog_ids} == {"<eos>", "<end_of_turn>"}


def test_sentencepiece_model(stories260k, shared):
    words = tokenizer.load(stories260k)
    for case in json.loads((shared / "data" / "golden" / "stories260k.json").read_text())["cases"]:
        assert words.encode(case["prompt"]) == case["ids"]
    # ids by sentencepiece 0.2.3; it takes extra spaces away, as this model's file wants
    expected = [261, 268, 426, 13, 429, 410, 485]
    assert (
        tokenizer.load(stories260k / "tok512.model").encode("  a   b.\nc é  ", add_special=False) == expected
    )


# How tokens are joined


def test_scores_decide_and_the_leftmost_among_equals():
    # he is best, then lo; hell would need ll, which lost its second l to lo
    assert pieces(SPM, "hello", add_special=False) == ["▁he", "l", "lo"]
    # aa aa, not a aa a; then the best union of all
    assert pieces(SPM, "aaaa", add_special=False) == ["▁", "aaaa"]
    assert pieces(SPM, "aaaaaa", add_special=False) == ["▁", "aaaa", "aa"]


def test_merges_are_joined_in_their_order():
    assert pieces(BPE, "hello hello", add_special=False) == ["hell", "o", "Ġhell", "o"]


def joined(ids, scores, text):
    """The definition: join the best neighbors, the leftmost of them, until there is nothing to join."""
    symbols = list(text)
    while True:
        unions = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in ids
        ]
        if not unions:
            return [ids.get(symbol, -1) for symbol in symbols]
        _, i = min(unions)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@settings(max_examples=300)
@given(
    st.dictionaries(st.text("ab▁", min_size=1, max_size=5), st.sampled_from([-3.0, -2.0, -1.0]), max_size=25),
    st.text("ab c", max_size=40),
)
def test_scores_against_the_definition(vocabulary, text):
    ids, scores = {token: i for i, token in enumerate(vocabulary)}, list(vocabulary.values())
    encode = spm.encoder(ids, scores, lambda char: [-1])
    assert encode(text) == joined(ids, scores, text.replace(" ", "▁"))


@settings(max_examples=300)
@given(
    st.lists(st.text("ab<^]", min_size=1, max_size=4), max_size=8, unique=True),
    st.text("ab<^] ", max_size=30),
)
def test_special_tokens_are_found_leftmost_and_longest(tokens, text):
    ids = {token: i for i, token in enumerate(tokens)}
    expected, at = [], 0
    while at < len(text):
        token = max((t for t in tokens if text.startswith(t, at)), key=len, default=None)
        if token:
            expected.append(ids[token])
        elif expected and isinstance(expected[-1], str):
            expected[-1] += text[at]
        else:
            expected.append(text[at])
        at += len(token or " ")
    assert list(special.splitter(ids)(text)) == expected


def test_every_named_cut_is_a_regular_expression():
    for name, cut in bpe.CUTS.items():
        words = tokenizer.from_gguf(bpe_meta(pre=name))
        text = "It's 12345 naïve\n\n  tests…"
        assert words.decode(words.encode(text)) == text, (name, cut)


# Text and special tokens


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=())))
@example("\ud800 lone, \ud83d\ude00 a pair")
@example("\x00\x00")
def test_text_comes_back(text):
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for words in (BPE, SPM):
        assert words.decode(words.encode(text)) == whole.replace("▁", " " if words is SPM else "▁")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "<", "é", "<tag>", "\x00"])
def test_long_runs(unit):
    text = unit * (100_000 // len(unit))
    for words in (BPE, SPM):
        assert words.decode(words.encode(text)) == text


def test_special_tokens_are_plain_text_unless_asked_for():
    for words, end in ((BPE, "<|im_end|>"), (SPM, "</s>")):
        assert words.eos_id not in words.encode(f"a{end}b", add_special=False)
        assert words.eos_id in words.encode(f"a{end}b", parse_special=True)
        assert words.decode(words.encode(f"a{end}b")) == f"a{end}b"
        ids = words.encode(f"{end}a", add_special=False, parse_special=True)
        assert words.decode(ids, special=True).replace(" ", "") == f"{end}a"
        assert words.decode(ids).strip() == "a"
        assert "<tag>" in pieces(words, "a<tag>b")  # a token for users
    assert SPM.encode("<0x41><unk>", add_special=False, parse_special=True)[-1] == 0  # bytes never by name


def test_bos_and_eos_are_added_once():
    assert SPM.encode("") == [1]
    assert (
        SPM.encode("<s>he", parse_special=True)
        == SPM.encode("he")
        == [1, *SPM.encode("he", add_special=False)]
    )
    both = tokenizer.from_gguf(bpe_meta(add_bos_token=True, add_eos_token=True))
    assert both.add_bos
    assert both.encode("he") == both.encode("<s>he<|im_end|>", parse_special=True) == [261, 256, 262]
    assert not BPE.add_bos
    assert BPE.encode("he") == [256]
    assert tokenizer.from_gguf(bpe_meta(pre="llama-bpe")).add_bos


def test_space_prefix():
    assert pieces(SPM, "he", add_special=False) == ["▁he"]
    assert pieces(SPM, "he<tag>he", add_special=False) == ["▁he", "<tag>", "▁he"]
    without = tokenizer.from_gguf(spm_meta(add_space_prefix=False))
    assert pieces(without, "he", add_special=False) == ["he"]
    assert without.decode(without.encode(" he")) == " he"


def test_token_and_range():
    assert (SPM.token(1), SPM.vocab_size) == ("<s>", 275)
    for id in (-1, 275):
        with pytest.raises(ValueError, match="not one of the vocabulary's 275"):
            SPM.decode([id])


def test_ends_of_generation():
    assert BPE.eog_ids == {262}
    tokens = ["<|im_end|>", "<|eot_id|>", "</s>", "<|end|>", "stop", "x", "y", "xy"]
    kinds = [4, 3, 4, 1, 3, 1, 1, 1]  # a tag named </s> ends nothing, nor does ordinary text
    changes = {"tokens": tokens, "token_type": np.array(kinds), "merges": ["x y"], "eot_token_id": 4}
    words = tokenizer.from_gguf(bpe_meta(**changes, bos_token_id=None, eos_token_id=None))
    assert words.eog_ids == {0, 1, 4}


# Streaming


@settings(max_examples=300)
@given(st.lists(st.integers(0, 262)), st.booleans(), st.sampled_from([BPE, SPM]))
def test_streaming_gives_the_same_text(ids, special, words):
    decoder = words.decoder(special=special, begin=True)
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == words.decode(ids, special=special)


def test_streaming_holds_back_unfinished_characters():
    decoder = SPM.decoder()
    smile = SPM.encode("😀", add_special=False)[1:]  # four bytes behind the space
    assert [decoder.push(id) for id in smile] == ["", "", "", "😀"]
    assert decoder.push(smile[0]) == ""
    assert decoder.push(SPM.encode("a", add_special=False)[-1]) == "\ufffda"
    assert decoder.push(smile[0]) + decoder.finish() == "\ufffd"


def test_streaming_goes_on_with_a_prompt():
    ids = SPM.encode("he", add_special=False)
    assert SPM.decoder().push(ids[0]) == " he"
    assert SPM.decoder(begin=True).push(ids[0]) == SPM.decode(ids) == "he"


# Files that are wrong


@pytest.mark.parametrize(
    ("meta", "changes", "message"),
    [
        (bpe_meta, {"model": "rwkv"}, 'model: found "rwkv", expected "gpt2" or "llama"'),
        (bpe_meta, {"model": None}, "model: found no tokenizer"),
        (bpe_meta, {"tokens": None}, "tokens: found none"),
        (bpe_meta, {"tokens": ["a", 1]}, "tokens: found something else"),
        (bpe_meta, {"tokens": ["a"] * 263}, "tokens: found 'a' twice"),
        (bpe_meta, {"token_type": np.ones(3, np.int32)}, r"token_type: found int32 \(3,\), expected 263"),
        (bpe_meta, {"token_type": np.full(263, 9)}, "token_type: found 9 to 9"),
        (bpe_meta, {"token_type": np.full(263, 6)}, "token_type: found byte token '!'"),
        (bpe_meta, {"token_type": [1] * 263}, "token_type: found list"),
        (bpe_meta, {"merges": None}, "merges: found none"),
        (bpe_meta, {"merges": ["h e", "he"]}, "merges: found 'he', expected two tokens"),
        (bpe_meta, {"merges": ["h e l"]}, "merges: found 'h e l', expected two tokens"),
        (bpe_meta, {"merges": ["a b"]}, "merges: found .*, expected merges of tokens"),
        (bpe_meta, {"pre": "klingon"}, 'pre: found "klingon", expected one of .*unknown_pre="default"'),
        (bpe_meta, {"bos_token_id": 263}, "bos_token_id: found 263, expected an id below 263"),
        (bpe_meta, {"eot_token_id": -1}, "eot_token_id: found -1"),
        (bpe_meta, {"eos_token_id": "2"}, "eos_token_id: found str, expected int"),
        (bpe_meta, {"add_bos_token": 1}, "add_bos_token: found int, expected bool"),
        (bpe_meta, {"add_eos_token": True, "eos_token_id": None}, "add_eos_token: found true"),
        (spm_meta, {"scores": None}, "scores: found NoneType, expected 275 numbers"),
        (spm_meta, {"scores": np.full(275, np.nan)}, "scores: found NaN"),
        (spm_meta, {"scores": np.zeros(274)}, "scores: found float64"),
    ],
)
def test_wrong_metadata_is_named(meta, changes, message):
    with pytest.raises(FormatError, match=f"^model.gguf: key tokenizer.ggml.{message}"):
        tokenizer.from_gguf(meta(**changes), "model.gguf")


def test_a_template_must_be_text():
    with pytest.raises(FormatError, match="tokenizer.chat_template: found int"):
        tokenizer.from_gguf(bpe_meta() | {"tokenizer.chat_template": 1})


def test_an_unknown_cut_can_be_replaced():
    words = tokenizer.from_gguf(bpe_meta(pre="klingon"), unknown_pre="default")
    assert words.encode("he 12") == tokenizer.from_gguf(bpe_meta(pre="default")).encode("he 12")
    with pytest.raises(FormatError, match="klingon"):
        tokenizer.from_gguf(bpe_meta(pre="klingon"), unknown_pre="romulan")


def test_a_missing_cut_warns():
    with pytest.warns(UserWarning, match="model.gguf: no tokenizer.ggml.pre"):
        tokenizer.from_gguf(bpe_meta(pre=None), "model.gguf")


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.text(max_size=3)
    | st.lists(st.text(max_size=3), max_size=4)
)
ARRAYS = st.lists(st.integers(-1, 7), max_size=3).map(np.array)


@settings(max_examples=200)
@given(st.sampled_from([bpe_meta(), spm_meta()]), st.data())
def test_metadata_is_sound_or_a_format_error(meta, data):
    keys = [
        *meta,
        *(f"tokenizer.ggml.{key}" for key in ("add_bos_token", "eom_token_id", "unknown_token_id")),
    ]
    key = data.draw(st.sampled_from([key for key in keys if not key.endswith(".pre")]))
    try:
        words = tokenizer.from_gguf(meta | {key: data.draw(VALUES | ARRAYS)})
    except FormatError:
        return
    assert words.decode(words.encode("he<s>é")) == "he<s>é"


# Hugging Face folders


def folder(path, *, config=None, engine=None, **settings):
    """A folder with a tokenizer that has the vocabulary of `bpe_meta`."""
    if engine is None:
        meta = bpe_meta()
        tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
        ids = {token: i for i, token in enumerate(tokens[:260])}
        engine = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [tuple(m.split()) for m in merges]))
        engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = tokenizers.decoders.ByteLevel()
        engine.add_tokens(["<tag>"])
        engine.add_special_tokens(["<s>", "<|im_end|>"])
    engine.save(str(path / "tokenizer.json"))
    for name, values in (("tokenizer_config", settings), ("config", config or {})):
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


@settings(max_examples=50)
@given(st.text())
def test_tokenizer_json_and_gguf_agree(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "agree"
    if not path.exists():
        path.mkdir()
        folder(path, bos_token="<s>", eos_token="<|im_end|>")
    words = tokenizer.load(path)
    for parse_special in (False, True):
        assert words.encode(text, parse_special=parse_special) == BPE.encode(
            text, parse_special=parse_special
        )
    assert words.decode(words.encode(text)) == text


def test_settings_of_a_folder(tmp_path):
    folder(
        tmp_path, bos_token={"content": "<s>"}, eos_token="<|im_end|>", add_bos_token=True, chat_template="A"
    )
    words = tokenizer.load(tmp_path / "tokenizer.json")
    assert (words.bos_id, words.eos_id, words.add_bos, words.chat_template) == (261, 262, True, "A")
    assert words.encode("he<|im_end|>") == [261, 256, *words.encode("<|im_end|>", add_special=False)]
    assert words.encode("<s>he<|im_end|>", parse_special=True) == [261, 256, 262]
    assert words.decode([261, 256, 262]) == "he"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert tokenizer.load(tmp_path).chat_template == "B"


def test_ids_from_the_configuration(tmp_path):
    folder(tmp_path, config={"vocab_size": 270, "bos_token_id": 261, "eos_token_id": [262, 260]})
    words = tokenizer.load(tmp_path)
    assert (words.bos_id, words.eos_id, words.eog_ids) == (261, 262, {260, 262})
    assert words.vocab_size == 270
    assert words.decode([256, 269]) == "he"  # a row of the model's matrix that stands for nothing


def test_named_templates(tmp_path):
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert tokenizer.load(folder(tmp_path, chat_template=templates)).chat_template == "D"


def test_bos_of_a_post_processor(tmp_path):
    engine = tokenizers.Tokenizer.from_file(str(folder(tmp_path) / "tokenizer.json"))
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 261), ("<|im_end|>", 262)]
    )
    words = tokenizer.load(folder(tmp_path, engine=engine, bos_token="<s>", eos_token="<|im_end|>"))
    assert words.encode("he") == engine.encode("he").ids == [261, 256, 262]
    words = tokenizer.load(folder(tmp_path, engine=engine, bos_token="<s>", add_bos_token=False))
    assert words.encode("he") == [256, 262]


def test_spaces_and_bytes_of_tokenizer_json(tmp_path):
    ids = {f"<0x{b:02X}>": b for b in range(256)} | {"▁": 256, "h": 257, "e": 258, "▁h": 259, "▁he": 260}
    merges = [("▁", "h"), ("▁h", "e")]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, byte_fallback=True))
    engine.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    engine.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    words = tokenizer.load(folder(tmp_path, engine=engine))
    for text in ("he", "he  he é\n", " he"):
        assert words.encode(text) == engine.encode(text).ids
        assert words.decode(words.encode(text)) == engine.decode(words.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token": "<none>"}, "bos_token: found '<none>', expected a token of the vocabulary"),
        ({"bos_token": 1}, "bos_token: found 1"),
        ({"add_bos_token": "yes"}, "add_bos_token: found 'yes', expected true or false"),
        ({"chat_template": 1}, "chat_template: found 1"),
        ({"config": {"bos_token_id": -1}}, "bos_token_id: found -1"),
        ({"config": {"bos_token_id": 999}}, "special token 999"),
        ({"config": {"vocab_size": 10**12}}, "263 tokens"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message):
        tokenizer.load(folder(tmp_path, **changes))


def test_wrong_tokenizer_json(tmp_path):
    with pytest.raises(FormatError, match="found no vocabulary, expected tokenizer.json or tokenizer.model"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(FormatError, match="expected a tokenizer"):
        tokenizer.load(tmp_path)
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    with pytest.raises(FormatError, match="decoder: found none, expected ByteLevel"):
        tokenizer.load(folder(tmp_path, engine=engine))


# SentencePiece models


def field(number, value):
    """A field of a protocol buffer: a number, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def sentencepiece_model(*, kind=2, charsmap=b"", tidy=0):
    """The vocabulary of `spm_meta` as a SentencePiece model."""
    meta = spm_meta()
    columns = (meta[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    raw = b""
    for token, score, number in zip(*columns, strict=True):
        value = varint(2 << 3 | 5) + np.float32(score).tobytes()
        raw += field(1, field(1, token.encode()) + value + field(3, int(number)))
    return raw + field(2, field(3, kind)) + field(3, field(2, charsmap) + field(4, tidy))


def test_a_sentencepiece_model_is_its_gguf(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    added = {"275": {"content": "<|im_end|>", "special": True}, "276": {"content": "<x>"}}
    settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": "A"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    words = tokenizer.load(tmp_path)
    for text in ("hello", " he <tag>aaaaa é"):
        assert words.encode(text) == SPM.encode(text)
    assert (words.bos_id, words.eos_id, words.eog_ids, words.chat_template) == (1, 275, {275}, "A")
    assert words.encode("<x>", add_special=False) == [276]
    assert words.encode("<|im_end|>", add_special=False, parse_special=True) == [275]
    alone = tokenizer.load(tmp_path / "tokenizer.model")
    assert (alone.eos_id, alone.encode("hello")) == (2, SPM.encode("hello"))


def test_extra_spaces_go_where_the_model_wants_it(tmp_path):
    (tmp_path / "x.model").write_bytes(sentencepiece_model(tidy=1))
    words = tokenizer.load(tmp_path)
    assert words.decode(words.encode("  he   he ")) == "he he"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x07", "wire type 7"),
        (b"junk", "it ends in a field"),
        (sentencepiece_model(kind=1), "a model of kind 1"),
        (sentencepiece_model(charsmap=b"x"), "a normalizer that rewrites characters"),
        (field(2, field(3, 2)), "no vocabulary"),
        (field(1, b"\xff" * 20), "more than 64 bits"),
        (field(1, field(1, b"\xff")), "utf-8"),
    ],
)
def test_wrong_sentencepiece_models_are_named(tmp_path, raw, message):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(FormatError, match=f"tokenizer.model: found a fault: .*{message}"):
        tokenizer.load(tmp_path)


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_sentencepiece_models_are_sound_or_a_format_error(tmp_path_factory, at, byte):
    raw = bytearray(sentencepiece_model())
    raw[at % len(raw)] = byte
    for content in (raw, raw[: at % len(raw)]):
        path = tmp_path_factory.getbasetemp() / "mutated.model"
        path.write_bytes(bytes(content) or b"x")
        try:
            words = tokenizer.load(path)
        except FormatError:
            continue
        words.decode(words.encode("hello <tag> é", parse_special=True))


def test_a_tokenizer_serves_several_threads(tmp_path):
    words = tokenizer.load(folder(tmp_path, bos_token="<s>"))
    text, wrong = "he<s>he " * 50, []
    expected = {special: words.encode(text, parse_special=special) for special in (False, True)}

    def work(special):
        wrong.extend(1 for _ in range(200) if words.encode(text, parse_special=special) != expected[special])

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
