"""Byte-level BPE: trained here on the corpus, or loaded from a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from eco_llm.errors import UserError

TRAIN = "train"
END_OF_TEXT = "<|endoftext|>"
# Names under which published tokenizers carry "a document ends here", most specific first.
_END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|end▁of▁sentence|>",
    "<|eot_id|>",
    "<|im_end|>",
)

# Words before byte-pair merges. Letters take one mark or space before them (` x`, `.append`, `_name`); digits go
# by threes; a line end takes the next line's indentation with it. On the standard library this gives 5% (V=4096) to
# 12% (V=32768) more bytes per token than GPT-2's pattern, at the same speed.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"

# Text with what loses information in lossy tokenizers: case, tabs, runs of spaces, accents, an emoji, a control byte.
_PROBE = "  def  F(x):\n\treturn {x:1234}\r\n# é e\u0301 中文 🙂 \x07 \n"


class Tokenizer:
    """A tokenizer.json as eco-llm uses it: no added tokens, no truncation, `<|endoftext|>` in a text is text.

    Attributes:
        vocab_size: rows an embedding needs, the highest id + 1.
        eot_id: id of the end-of-text token that closes every document.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, source: str = "tokenizer") -> None:
        inner.no_truncation()
        inner.no_padding()
        # A corpus that mentions the token's name must not be cut there. Not part of the file, so set on each load.
        inner.encode_special_tokens = True
        self._inner = inner
        vocab = inner.get_vocab(with_added_tokens=True)
        name = next((n for n in _END_NAMES if n in vocab), None)
        if name is None:
            raise UserError(f"--tokenizer {source}: no end-of-text token; it needs one of {' '.join(_END_NAMES)}")
        self.eot_id: int = vocab[name]
        self.vocab_size: int = max(vocab.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-text token."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, each int64 [n], encoded on all cores."""
        batch = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; the end-of-text token shows by its name."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def lossless(self) -> bool:
        """Whether a probing text survives encoding and decoding; if not, bits per byte describe another text."""
        return self.decode(self.encode(_PROBE)) == _PROBE

    def to_json(self) -> str:
        """The tokenizer.json, one canonical spelling for one tokenizer."""
        return self._inner.to_str(pretty=True)

    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids, 32 hex digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that every `tokenizers`-based library reads."""
        path.write_text(self.to_json(), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            UserError: missing, not a tokenizer.json, or without an end-of-text token.
        """
        path = path.expanduser()
        if path.is_dir():
            raise UserError(f"--tokenizer {path}: a folder; name the tokenizer.json in it")
        try:
            raw = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"--tokenizer {path}: no such file (or `train` to train one)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--tokenizer {path}: cannot be read: {error}") from error
        try:
            if not isinstance(json.loads(raw), dict):
                raise ValueError("not an object")
            inner = tokenizers.Tokenizer.from_str(raw)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"--tokenizer {path}: not a tokenizer.json: {str(error).splitlines()[0]}") from error
        return cls(inner, source=str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` ids (fewer when the text has too few pairs to merge).

        All 256 bytes are in the alphabet, so every text is representable and decodes to itself. The result depends only
        on the texts: the trainer counts words on all cores, but counts add up to the same sums in any order, and ties
        between pairs are broken by id.
        """
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)
