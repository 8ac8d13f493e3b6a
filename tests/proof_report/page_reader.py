"""A strict reader of our HTML: its tree, and complaints about what is not well formed or not accessible."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "input", "hr"}
_ENDS_ITSELF = {"path", "rect"}


@dataclass
class Node:
    """One element."""

    tag: str
    attrs: dict[str, str | None]
    children: list[Node] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Node]:
        """Elements of that name below this one, in the page's order."""
        found = [c for c in self.children if c.tag == tag]
        return [n for c in self.children for n in ([c] if c in found else []) + c.all(tag)]

    def words(self) -> str:
        """All text below."""
        return self.text + "".join(c.words() for c in self.children)


class Page(HTMLParser):
    """`root` is the tree; `complaints` says what is wrong with it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("#root", {})
        self.complaints: list[str] = []
        self._open = [self.root]
        self.feed(html)
        self.close()
        if len(self._open) > 1:
            self.complaints.append(f"never closed: {[n.tag for n in self._open[1:]]}")
        self._check_ids()
        self._check_access()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.complaints.append(f"attribute twice in <{tag}>")
        node = Node(tag, dict(attrs))
        self._open[-1].children.append(node)
        if tag not in _VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _ENDS_ITSELF:
            self.complaints.append(f"<{tag}/> does not end itself in HTML")
        self._open[-1].children.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1].tag == tag:
            self._open.pop()
        else:
            self.complaints.append(f"</{tag}> where <{self._open[-1].tag}> is open, line {self.getpos()[0]}")

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data

    def _check_ids(self) -> None:
        everything = _below(self.root)
        ids = [n.attrs["id"] for n in everything if "id" in n.attrs]
        self.complaints += [f"id twice: {i}" for i in ids if ids.count(i) > 1]
        for node in everything:
            for name in (node.attrs.get("aria-labelledby") or "").split():
                if name not in ids:
                    self.complaints.append(f"aria-labelledby names no element: {name}")
            href = node.attrs.get("href") or ""
            if node.tag == "a" and href.startswith("#") and href[1:] not in ids:
                self.complaints.append(f"link to no anchor: {href}")

    def _check_access(self) -> None:
        """What the usual checkers ask of a page of headings, tables and charts."""
        root, say = self.root, self.complaints.append
        (html,) = root.all("html")
        if not html.attrs.get("lang"):
            say("no language")
        if len(root.all("h1")) != 1 or len(root.all("main")) != 1 or not root.all("title")[0].words().strip():
            say("one h1, one main and a title are wanted")
        for table in root.all("table"):
            captions, heads = table.all("caption"), table.all("th")
            if len(captions) != 1 or not captions[0].words().strip():
                say("table without a caption")
            if any(th.attrs.get("scope") not in ("col", "row") for th in heads):
                say("header cell without scope")
            if any(not th.words().strip() for th in heads):
                say(f"empty header cell in {captions[0].words()}")
            widths = {len([c for c in row.children if c.tag in ("td", "th")]) for row in table.all("tr")}
            if len(widths) != 1:
                say(f"rows of different lengths in {captions[0].words()}: {widths}")
        for svg in root.all("svg"):
            if svg.attrs.get("role") != "img" or not svg.attrs.get("aria-labelledby"):
                say("chart without a role and a name")
            if not svg.all("title")[0].words().strip() or not svg.all("desc")[0].words().strip():
                say("chart without title and desc")
        for box in _below(root):
            if "scroll" in (box.attrs.get("class") or "").split() and (
                box.attrs.get("tabindex") != "0" or not box.attrs.get("aria-label") or not box.attrs.get("role")
            ):
                say("a box that scrolls cannot be reached by keyboard, or has no name")
        for link in root.all("a"):
            if not link.words().strip() or not link.attrs.get("href"):
                say("link without text or address")


def _below(node: Node) -> list[Node]:
    return [n for child in node.children for n in [child, *_below(child)]]
