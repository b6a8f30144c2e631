"""Byte-level byte-pair encoding: regular expressions cut text into words, whose bytes are written as
printable characters (both done by the tokenizers library), and neighbors are joined in the order of a list of
merges.

    "don't  stop"  →  don | 't | ␣ | ␣stop  →  don | 't | Ġ | Ġstop  →  ids

Each model cuts text in its own way. GGUF files name it (`tokenizer.ggml.pre`), and CUTS has the expressions
under those names, as the models' own tokenizer.json files have them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from . import merge


class Cut(NamedTuple):
    """How text is cut into words.

    Attributes
    ----------
    patterns : regular expressions, applied one after the other; a word is a match, or what lies between two.
    whole_words : a word that is a token needs no merges (``ignore_merges`` in tokenizer.json).
    add_bos : whether these models begin with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_L, _M, _N, _P, _S = r"\p{L}", r"\p{M}", r"\p{N}", r"\p{P}", r"\p{S}"
_N3 = r"\p{N}{1,3}"
_SPACES = r"\s+(?!\S)|\s+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?[^\s{_L}{_N}]+|{_SPACES}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n{_L}{_N}]?[{_L}{_M}]+|{_N}| ?[^\s{_L}{_M}{_N}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
_DEEPSEEK3 = (
    _N3,
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^\r\n{_L}{_P}{_S}]?[{_L}{_M}]+| ?[{_P}{_S}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
)


def _llama3(digits: str) -> str:
    """Llama 3's expression, given how many digits stay together."""
    return rf"{_CONTRACTION}|[^\r\n{_L}{_N}]?{_L}+|{digits}| ?[^\s{_L}{_N}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"


def _gpt4o(digits: str, contraction: str) -> str:
    """GPT-4o's expression, in which a capital inside a word begins another one."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = rf"[^\r\n{_L}{_N}]?"
    words = f"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}| ?[^\s{_L}{_N}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"


_FAMILIES = {
    "gpt-2 phi-2 mpt olmo jais trillion exaone4 mellum gigachat granite-docling a.x-4.0": Cut((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Cut((_N, _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Cut((_llama3(_N3),), True, True),
    "dbrx smaug-bpe chatglm-bpe": Cut((_llama3(_N3),)),
    "glm4": Cut((_llama3(_N3),), whole_words=True),
    "qwen2 stablelm2 hunyuan deepseek-r1-qwen megrez kormo grok-2 solar-open": Cut((_llama3(_N),)),
    "qwen35": Cut((_QWEN35,)),
    "deepseek-v3 hunyuan-dense": Cut(_DEEPSEEK3),
    "gpt-4o llama4 kanana2 minimax-m2": Cut((_gpt4o(_N3, f"{_CONTRACTION}?"),)),
    "tekken": Cut((_gpt4o(_N, ""),), whole_words=True, add_bos=True),
    "falcon": Cut((rf"[{_P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": Cut((rf"[{_P}\$\+<=>\^~\|]+", _GPT2, rf"{_N}+", "[0-9][0-9][0-9]")),
}
CUTS = {name: cut for names, cut in _FAMILIES.items() for name in names.split()}


def encoder(ids: Mapping[str, int], merges: Sequence[str], cut: Cut) -> Callable[[str], list[int]]:
    """A function text -> ids; merges are "left right", best first, and make tokens."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}

    def order(word: str, i: int, j: int, k: int) -> int | None:
        return ranks.get(f"{word[i:j]} {word[j:k]}")

    of_merged = merge.encoder(order, lambda symbol: (ids[symbol],))
    unspelled = {ord(letter): None for letter in _BYTES if letter not in ids}  # bytes that are no tokens

    def of_word(word: str) -> Sequence[int]:
        if cut.whole_words and word in ids:
            return (ids[word],)
        return of_merged(word.translate(unspelled) if unspelled else word)

    split = cutter(cut).pre_tokenize_str
    return lambda text: [id for word, _ in split(text) for id in of_word(word)]


def engine(ids: Mapping[str, int], merges: Sequence[str], cut: Cut) -> tokenizers.Tokenizer:
    """The library's tokenizer, without special tokens."""
    pairs = [(left, right) for left, _, right in (pair.partition(" ") for pair in merges)]
    made = tokenizers.Tokenizer(models.BPE(dict(ids), pairs, ignore_merges=cut.whole_words))
    made.pre_tokenizer = cutter(cut)
    return made


def cutter(cut: Cut) -> pre_tokenizers.PreTokenizer:
    """What cuts text into words, and spells their bytes."""
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    return pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


# A byte is written as the character of its number where that prints, the other 68 as U+0100 and on.
_PRINTING = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTES = {chr(b): b for b in _PRINTING}
_BYTES |= {chr(0x100 + i): b for i, b in enumerate(sorted({*range(256)} - _PRINTING))}


def to_bytes(token: str) -> bytes:
    """The bytes that a token stands for; one with a character that stands for no byte is text as it is."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return token.encode()
