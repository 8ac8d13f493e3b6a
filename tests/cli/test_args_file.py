"""@file expansion: what users may write, and the one line they get when they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from eco_llm.cli.args_file import expand
from eco_llm.errors import UserError


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "args.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--steps 3 --no-resume", ["--steps", "3", "--no-resume"]),
        ("--steps 3\n\n   --lr 1e-3\n", ["--steps", "3", "--lr", "1e-3"]),
        ("# all of it\n--steps 3 # the rest\n#--lr 1", ["--steps", "3"]),
        ("--data a#b", ["--data", "a#b"]),
        ("--data \"my books/*.txt\" 'x y'", ["--data", "my books/*.txt", "x y"]),
        ('--data="my books"', ["--data=my books"]),
        ('--sample-prompt ""', ["--sample-prompt", ""]),
        (r"--output-dir C:\test5\runs\main", ["--output-dir", r"C:\test5\runs\main"]),
        ("\ufeff--steps 3\r\n--lr 1\r\n", ["--steps", "3", "--lr", "1"]),
        ("", []),
    ],
)
def test_words_of_a_file(write, text: str, expected: list[str]) -> None:
    assert expand([f"@{write(text)}"]) == expected


def test_expansion_is_in_place_so_that_later_flags_win(write) -> None:
    path = write("--steps 3")
    assert expand(["--lr", "1", f"@{path}", "--steps", "5"]) == ["--lr", "1", "--steps", "3", "--steps", "5"]


@pytest.mark.parametrize("form", ["@{}", "--args-file {}", "--args-file={}"])
def test_three_ways_to_name_a_file(write, form: str) -> None:
    assert expand(form.format(write("--steps 3")).split()) == ["--steps", "3"]


def test_nested_files_are_relative_to_the_file_that_names_them(write) -> None:
    write("--steps 3", "inner/base.txt")
    write("@base.txt --lr 1", "inner/middle.txt")
    assert expand([f"@{write('@inner/middle.txt --seed 2')}"]) == ["--steps", "3", "--lr", "1", "--seed", "2"]


def test_a_value_may_begin_with_an_at_sign() -> None:
    assert expand(["--sample-prompt=@property"]) == ["--sample-prompt=@property"]


@pytest.mark.parametrize(
    ("text", "message"),
    [('--data "a b', "args.txt:1: unbalanced quote"), ("\n--data a'b", "args.txt:2: unbalanced quote")],
)
def test_unbalanced_quotes_name_file_and_line(write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand([f"@{write(text)}"])


def test_a_file_that_includes_itself_is_refused(write) -> None:
    path = write("@args.txt")
    with pytest.raises(UserError, match="includes itself"):
        expand([f"@{path}"])


def test_missing_unreadable_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist \(a value that begins with @ is written --flag=@value\)"):
        expand([f"@{tmp_path / 'none.txt'}"])
    with pytest.raises(UserError, match="cannot be read"):
        expand([f"@{tmp_path}"])
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        expand([f"@{tmp_path / 'x.bin'}"])
    for words in (["--args-file"], ["--args-file="]):
        with pytest.raises(UserError, match="needs a file name"):
            expand(words)
