"""What was left out of a corpus, and why: counted, with the first few examples of each reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BAD_UTF8 = "bad UTF-8"
EMPTY = "empty document"
BAD_JSON = "bad JSON record"
NO_FIELD = "record without the text field"
NOT_TEXT = "text field is not a string"
DUPLICATE = "duplicate content"
UNREADABLE = "unreadable file"
OTHER_TYPE = "file of another type"
HIDDEN = "hidden folder"

MAX_EXAMPLES = 5


@dataclass
class Skips:
    """Skipped items: reason → how many, and reason → the first few places (`id` or `id: detail`)."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """Count one skipped item; `where` names it, `detail` says what is wrong with it."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(f"{where}: {detail}" if detail else where)

    @property
    def total(self) -> int:
        """Skipped items of every reason."""
        return sum(self.counts.values())

    def summary(self) -> str:
        """One line: `4 bad UTF-8 (a.py, b.py, …); 2 empty document (c.py)`; empty when nothing was skipped."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            shown = [example.split(": ")[0] for example in self.examples[reason][:2]]
            parts.append(f"{count} {reason} ({', '.join(shown)}{', …' if count > len(shown) else ''})")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in the manifest."""
        return {r: {"count": self.counts[r], "examples": self.examples[r]} for r in sorted(self.counts)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Skips:
        """Inverse of `to_dict`."""
        return cls({r: v["count"] for r, v in raw.items()}, {r: list(v["examples"]) for r, v in raw.items()})
