from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eco_llm.data.documents import cut
from eco_llm.data.split import SplitPlan, divide, held_out, plan_split


def test_the_hash_holds_out_about_the_asked_share_and_always_the_same() -> None:
    texts = [f"document {i}" for i in range(20_000)]
    share = sum(held_out(t, 0.1) for t in texts) / len(texts)
    assert abs(share - 0.1) < 0.01  # five standard deviations
    assert [held_out(t, 0.1) for t in texts[:50]] == [held_out(t, 0.1) for t in texts[:50]]
    assert all(held_out(t, 0.2) for t in texts if held_out(t, 0.1))  # a larger share only adds documents


def test_splitting_by_document_is_given_up_only_when_it_misses_the_share() -> None:
    big = 10**8
    assert plan_split(0.01, big, big // 100) == SplitPlan("document", 0.01)
    assert plan_split(0.01, big, big // 100 * 4).mode == "document"
    assert plan_split(0.5, big, big // 2).mode == "document"
    for held in (0, big // 1000, big // 10, big):
        assert plan_split(0.01, big, held) == SplitPlan("tail", 0.01)
    assert plan_split(0.5, big, big * 9 // 10).mode == "tail"
    assert plan_split(0.01, 10_000, 100) == SplitPlan("tail", 0.1)  # a tiny corpus holds out a tenth
    assert plan_split(0.01, 100_000, 0).fraction == 4096 / 100_000


def test_whole_documents_go_to_one_side() -> None:
    text = "line\n" * 40
    plan = SplitPlan("document", 0.5)
    sides = {side for side, _ in divide(cut([text], 16), len(text), plan)}
    assert sides == {"val" if held_out(next(cut([text], 16)), 0.5) else "train"}


@given(
    st.text(alphabet=st.sampled_from("ab\né🙂"), min_size=1, max_size=200),
    st.floats(0.01, 0.5),
    st.integers(1, 50),
)
def test_a_tail_is_the_end_of_the_document_and_never_cuts_a_character(text: str, share: float, limit: int) -> None:
    size = len(text.encode())
    parts = list(divide(cut([text], limit), size, SplitPlan("tail", share)))
    assert "".join(t for _, t in parts) == text
    sides = [side for side, _ in parts]
    assert sides == sorted(sides)  # every train part before every val part
    val = sum(len(t.encode()) for side, t in parts if side == "val")
    # Up to the end of the line it falls in the tail may start later, by less than one piece; or earlier by a character.
    assert share * size - 4 * limit - 1 <= val <= share * size + 4


def test_a_tail_starts_at_a_line() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    parts = dict(divide([text], len(text), SplitPlan("tail", 0.1)))
    assert parts["train"].endswith("\n")
    assert parts["val"].startswith("line ")
    assert 0.08 < len(parts["val"]) / len(text) <= 0.1
