"""The document as one HTML file: no network, no script needed to read it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eco_llm.proof.report import charts
from eco_llm.proof.report.document import Block, Document, LineChart, Source
from eco_llm.proof.report.links import Link


def render(document: Document, link: Link, *, live: str | None = None) -> str:
    """HTML text. `live` makes a page that keeps itself up to date: the version (ETag) of what is shown."""
    template = _environment().get_template("page.html.j2")
    return template.render(document=document, link=link, live=live, title_of=_titles).lstrip()


def _titles(sources: tuple[Source, ...]) -> str:
    """What a number's tooltip says: where it was read, with the unrounded value."""
    origin = "\n".join(map(str, sources[:8]))
    return f"computed from\n{origin}" if len(sources) > 1 else origin


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("eco_llm.proof.report", "page"),
        autoescape=True,  # run names, prompts and messages of exceptions are not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["line_chart"] = charts.line_chart
    environment.globals["bar_shapes"] = charts.bar_shapes
    environment.globals["include_raw"] = _raw
    environment.globals["svg"] = {"width": charts.WIDTH, "height": charts.HEIGHT}
    environment.filters["side_by_side"] = _side_by_side
    environment.tests["block"] = _is_block
    return environment


def _raw(name: str) -> Markup:
    """One of the page's own files, as it is."""
    loader: Any = _environment().loader
    return Markup(loader.get_source(_environment(), name)[0])


def _side_by_side(blocks: Iterable[Block]) -> list[tuple[bool, list[tuple[int, Block]]]]:
    """(whether they are charts, numbered blocks): neighbouring charts share a row where the page is wide."""
    parts = groupby(enumerate(blocks), key=lambda numbered: isinstance(numbered[1], LineChart))
    return [(charts_here, list(part)) for charts_here, part in parts]


def _is_block(block: object, kind: str) -> bool:
    return type(block).__name__ == kind
