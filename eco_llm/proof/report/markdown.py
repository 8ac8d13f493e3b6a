"""The document as Markdown that GitHub, editors and people read. Curves are given by their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator

from eco_llm.proof.report.document import Block, Cards, Cell, Code, Document, LineChart, StackedBars, Table, Text
from eco_llm.proof.report.links import Link


def render(document: Document, link: Link) -> str:
    """Markdown text, ending in one newline."""
    lines = [f"# {escape(document.title)}", "", f"Date: {_cell(document.date, link)}  "]
    lines.append("Runs: " + ", ".join(_cell(run, link) for run in document.runs))
    for section in document.sections:
        lines += ["", f"## {escape(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block, link)]
    return "\n".join(lines) + "\n"


def _block(block: Block, link: Link) -> Iterator[str]:
    if isinstance(block, Text):
        sentence = "".join(_cell(p, link) if isinstance(p, Cell) else escape(p) for p in block.parts)
        yield f"**{sentence}**" if block.kind == "verdict" else sentence
    elif isinstance(block, Code):
        if block.summary:
            yield f"{escape(block.summary)}:"
            yield ""
        elif block.source:
            yield f"From {_cell(Cell(block.source.label, (block.source,)), link)}:"
            yield ""
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        yield f"{fence}text"
        yield block.text
        yield fence
    elif isinstance(block, Cards):
        for card in block.cards:
            before = f", {_cell(card.before, link)} before" if card.before else ""
            change = f" ({_cell(card.change, link)})" if card.change else ""
            yield f"- {escape(card.label)}, {escape(card.note)}: **{_cell(card.value, link)}**{before}{change}"
    elif isinstance(block, Table):
        yield from _table(block, link)
    elif isinstance(block, (LineChart, StackedBars)):
        yield from _table(block.table, link)


def _table(table: Table, link: Link) -> Iterator[str]:
    yield f"### {escape(table.caption)}"
    yield ""
    yield _row([escape(name) for name in table.header])
    yield _row(["---", *(["---:" if table.numeric else "---"] * (len(table.header) - 1))])
    for row in table.rows:
        yield _row([_cell(cell, link) for cell in row])
    if table.note:
        yield ""
        yield escape(table.note)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell, link: Link) -> str:
    shown = _code(cell.text) if cell.code and cell.text else escape(cell.text)
    shown = f"[{shown}]({link(cell.sources[0])})" if cell.sources else shown
    return f"{shown}, {escape(cell.unit)}" if cell.unit else shown


def _code(text: str) -> str:
    """A code span; in a table the bar must be escaped even there."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", r"\|")


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(text.split(" ")).replace("\n", " "))
