from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eco_llm.data.documents import cut

TEXT = st.text(alphabet=st.sampled_from("ab \n\t\ré"), max_size=200)


@given(TEXT, st.integers(1, 20), st.integers(1, 30))
def test_pieces_join_to_the_text_and_do_not_depend_on_the_chunks(text: str, limit: int, chunk: int) -> None:
    whole = list(cut([text], limit))
    chunked = list(cut([text[i : i + chunk] for i in range(0, len(text), chunk)], limit))
    assert "".join(whole) == text
    assert chunked == whole
    assert all(0 < len(piece) <= limit for piece in whole)


def test_a_piece_ends_before_an_unindented_line_then_at_any_line_then_anywhere() -> None:
    assert list(cut(["a\nb\n  c\n  d"], 9)) == ["a\n", "b\n  c\n  d"]
    assert list(cut(["  a\n  b\n  c"], 9)) == ["  a\n  b\n", "  c"]
    assert list(cut(["abcdefgh"], 3)) == ["abc", "def", "gh"]
