"""Comma lists on the command line become a grid."""

from __future__ import annotations

import pytest

from eco_llm.cli import grid
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.errors import UserError


def split(line: str, **options: object) -> tuple[list[str], dict[str, list[str]]]:
    return grid.split(line.split(), **options)


@pytest.mark.parametrize(
    ("line", "rest", "axes"),
    [
        ("--batch-size 2,4", "", {"batch_size": ["2", "4"]}),
        ("--batch_size=2,4 --lr 1e-3", "--lr 1e-3", {"batch_size": ["2", "4"]}),
        ("--batch-size 8 --seq-len 64 --batch-size 2,4", "--seq-len 64", {"batch_size": ["2", "4"]}),
        ("--lr 1,2 --batch-size 2,4 --lr 3", "--lr 1,2 --lr 3", {"batch_size": ["2", "4"]}),  # the last lr wins
        ("--torch-compile on,off --steps 3", "--steps 3", {"torch_compile": ["on", "off"]}),
        ("--torch-compile on,off --no-torch-compile --lr 1,2", "--torch-compile on,off --no-torch-compile",
         {"lr": ["1", "2"]}),
        ("--perf-sync-boundaries on,off", "", {"perf_sync_boundaries": ["on", "off"]}),
        ("--perf-sync-boundaries --lr 1,2", "--perf-sync-boundaries", {"lr": ["1", "2"]}),
        ("--data a,b.txt c,d.txt --lr 1,2", "--data a,b.txt c,d.txt", {"lr": ["1", "2"]}),
        ("--data=a,b.txt --sample-prompt x,y --lr 1,2", "--data=a,b.txt --sample-prompt x,y", {"lr": ["1", "2"]}),
        ("--output-dir a,b --mamba-chunk 64,auto", "--output-dir a,b", {"mamba_chunk": ["64", "auto"]}),
    ],
)  # fmt: skip
def test_lists_are_taken_out(line: str, rest: str, axes: dict[str, list[str]]) -> None:
    assert split(line) == (rest.split(), axes)


def test_the_points_parse_to_what_was_typed() -> None:
    words, axes = split("--seq-len 64 --batch-size 2,4 --torch-compile on,off --perf-sync-boundaries off,on")
    configs = [parse(TrainConfig, [*words, *grid.flags(p)], prog="t") for p in grid.points(axes)]
    found = [(c.training.batch_size, c.runtime.torch_compile, c.perf.perf_sync_boundaries) for c in configs]
    assert found == [(b, c, s) for b in (2, 4) for c in ("on", "off") for s in (False, True)]
    assert {c.training.seq_len for c in configs} == {64}


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("--lr 1 --steps 9 --seed 3", "--lr 1 --seed 3"),
        ("--steps=9 --output-dir a,b --no-resume --lr 1", "--lr 1"),
        ("--output_dir x --data a b --steps 3 --steps 4", "--data a b"),
        ("--data a --perf-profile-enable --torch-compile", "--data a --torch-compile"),
    ],
)
def test_flags_are_taken_away_with_their_values(line: str, left: str) -> None:
    fields = {"steps", "output_dir", "resume", "perf_profile_enable"}
    assert grid.without(line.split(), fields) == left.split()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-size 4", "nothing to sweep"),
        ("--batch-size 2,4,", "empty"),
        ("--batch-size 2,,4", "empty"),
        ("--batch-size 2,4,2", "2 is there twice"),
        ("--batch-size 2,02", "--batch-size 2,02: 02 is there twice, as 2"),
        ("--lr 1e-3,0.001", "0.001 is there twice, as 1e-3"),
        ("--lr 1,1.0", "1.0 is there twice, as 1"),
        ("--perf-sync-boundaries yes,no", "'yes' is not one of on, off"),
        ("--steps 1,2", "--steps cannot be a list"),
    ],
)
def test_what_is_no_grid_is_refused(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(line, fixed=("steps",))
