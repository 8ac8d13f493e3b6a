from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eco_llm.data.documents import cut
from eco_llm.data.tokenizer import END_OF_TEXT, Tokenizer
from eco_llm.errors import UserError

SAMPLE = [Path(json.__file__).read_text(encoding="utf-8"), Path(random.__file__).read_text(encoding="utf-8")]
TOKENIZER = Tokenizer.train(SAMPLE, 600)
# Besides arbitrary Unicode: what the word pattern and the special token care about.
TEXT = st.lists(st.text(max_size=20) | st.sampled_from([END_OF_TEXT, "\r\n", "    ", "\t", "x1234567", "don't"])).map(
    "".join
)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_survives_the_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eot_id not in ids
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.encode_batch([text, "a"])[0].tolist() == ids


@given(st.text(alphabet=st.sampled_from("ab.(_1 \n\t\ré"), max_size=300), st.integers(1, 40))
@settings(deadline=None)
def test_cutting_before_an_unindented_line_changes_no_token(text: str, limit: int) -> None:
    pieces = list(cut([text], limit))
    ends = [piece.endswith("\n") and not nxt[0].isspace() for piece, nxt in pairwise(pieces)]
    joined, run = [], ""
    for piece, exact in zip(pieces, [*ends, True], strict=False):  # rejoin what was cut elsewhere
        run += piece
        if exact:
            joined += TOKENIZER.encode(run)
            run = ""
    assert joined == TOKENIZER.encode(text)


def test_all_bytes_are_in_the_alphabet_and_the_size_is_what_was_asked() -> None:
    assert TOKENIZER.vocab_size == 600
    assert TOKENIZER.eot_id == 0
    assert TOKENIZER.decode([0]) == END_OF_TEXT
    bare = Tokenizer.train([""], 4096)  # nothing to merge: 256 bytes and the end-of-text token
    assert bare.vocab_size == 257
    assert bare.decode(bare.encode("é🙂")) == "é🙂"
    assert bare.lossless()


def test_words_are_cut_as_documented() -> None:
    trained = Tokenizer.train(["\n        return 1234567 + self._name\n" * 200], 400)
    words = [trained.decode([i]) for i in trained.encode("\n        return 1234567 + self._name")]
    assert words == ["\n        ", "return", " ", "123", "456", "7", " +", " self", "._", "name"]


def test_training_gives_the_same_file_whatever_the_threads() -> None:
    code = (
        "import json, random, sys; from pathlib import Path; from eco_llm.data.tokenizer import Tokenizer;"
        "texts = [Path(m.__file__).read_text(encoding='utf-8') for m in (json, random)];"
        "print(Tokenizer.train(texts, 600).fingerprint())"
    )
    seen = {TOKENIZER.fingerprint(), Tokenizer.train(list(SAMPLE), 600).fingerprint()}
    for threads in ("1", "4"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(run.stdout.strip())
    assert len(seen) == 1


def test_save_and_load_give_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint() == TOKENIZER.fingerprint()
    text = f"a {END_OF_TEXT} b"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert (loaded.vocab_size, loaded.eot_id) == (TOKENIZER.vocab_size, TOKENIZER.eot_id)


def test_a_file_that_truncates_or_adds_tokens_does_neither_here(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    inner = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    text = "def f(x): return x + 1"
    assert Tokenizer.load(path).encode(text) == TOKENIZER.encode(text)
    assert Tokenizer.load(path).encode_batch([text])[0].tolist() == TOKENIZER.encode(text)


def test_ids_beyond_the_count_are_counted_and_other_end_names_found(tmp_path: Path) -> None:
    raw = json.loads(TOKENIZER.to_json())
    vocab = raw["model"]["vocab"]
    vocab["</s>"] = vocab.pop(END_OF_TEXT)
    raw["added_tokens"][0]["content"] = "</s>"
    last = max(vocab, key=lambda token: vocab[token])
    vocab[last] = 5000  # leaves a gap: 600 tokens, ids up to 5000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert loaded.decode([loaded.eot_id]) == "</s>"
    assert loaded.vocab_size == 5001


def test_a_lossy_tokenizer_says_so() -> None:
    import tokenizers
    from tokenizers import normalizers

    inner = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    inner.normalizer = normalizers.Lowercase()
    assert not Tokenizer(inner).lossless()
    assert TOKENIZER.lossless()


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"^--tokenizer .*tokenizer\.json: not a tokenizer\.json: .+$"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="a folder"):
        Tokenizer.load(tmp_path)
