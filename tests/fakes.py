"""Models of a few lines, whose every answer is known, and a tokenizer to go with them."""

import zlib
from types import SimpleNamespace

import numpy as np

from edgeq import arch, tokenizer
from edgeq.kernels.cache import KVCache
from edgeq.llm import LLM

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCAB = len(CONTROL) + 256
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(add_bos=False, chat_template=CHATML):
    """Five control tokens, and a token for each byte of UTF-8."""
    return tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": CONTROL + ["▁" if b == 32 else f"<0x{b:02X}>" for b in range(256)],
            "tokenizer.ggml.token_type": np.array(
                [2, 3, 3, 3, 3] + [1 if b == 32 else 6 for b in range(256)]
            ),
            "tokenizer.ggml.scores": np.zeros(VOCAB, np.float32),
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": add_bos,
            "tokenizer.chat_template": chat_template,
        }
    )


def ids_of(text):
    return [len(CONTROL) + byte for byte in text.encode()]


class Fake:
    """A model that counts its caches and computed tokens; it takes its turn, as `arch.Model` does."""

    def __init__(self, context_length=200):
        self.config = SimpleNamespace(name="fake", vocab_size=VOCAB, context_length=context_length)
        self.caches, self.computed = 0, 0

    def new_cache(self, capacity):
        self.caches += 1
        self.last_cache = KVCache(capacity, 1, 2, ())
        return self.last_cache

    def __call__(self, ids, cache, logits="last"):
        rows = []
        with arch.TURN:
            for i in ids:
                cache.tokens.append(i)
                rows.append(self.after(cache.tokens))
                self.computed += 1
        return np.stack(rows if logits == "all" else rows[-1:])

    def step(self, ids, caches):
        return np.concatenate([self([i], cache) for i, cache in zip(ids, caches, strict=True)])


class Checksum(Fake):
    """Logits that every token so far has a say in; letters only, and no end."""

    def after(self, ids):
        x = np.full(VOCAB, -100, np.float32)
        rng = np.random.default_rng(zlib.crc32(np.asarray(ids, np.int64).tobytes()))
        x[ids_of("abcdefgh")] = rng.standard_normal(8)
        return x


class Script(Fake):
    """Says the same after any prompt, and </s> at last."""

    def __init__(self, text, prompt_n, **options):
        super().__init__(**options)
        self.ids, self.prompt_n = [*ids_of(text), 2], prompt_n

    def after(self, ids):
        x = np.zeros(VOCAB, np.float32)
        x[self.ids[max(len(ids) - self.prompt_n, 0) % len(self.ids)]] = 50
        return x


def checksum_llm(**options):
    return LLM(Checksum(), byte_tokenizer(), **options)


def greedy(prompt, n):
    """What Checksum says, from its definition."""
    model, ids = Checksum(), ids_of(prompt)
    for _ in range(n):
        ids.append(int(model.after(ids).argmax()))
    return byte_tokenizer().decode(ids[-n:])
