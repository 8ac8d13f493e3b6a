"""Git revisions of eco-llm, checked out beside the working tree for as long as they are measured."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eco_llm.errors import UserError

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Revision:
    """A revision that exists."""

    name: str
    """As typed."""
    commit: str
    repository: Path

    @staticmethod
    def find(name: str, flag: str) -> Revision:
        """Look a revision up, writing nothing.

        Raises:
            UserError: there is no git, no checkout of eco-llm, or no such revision.
        """
        if getattr(sys, "frozen", False):
            raise UserError(f"{flag} needs a checkout of eco-llm and its Python; this is the one-folder executable")
        if shutil.which("git") is None:
            raise UserError(f"{flag} needs git on the PATH")
        if not (_PACKAGE_ROOT / ".git").exists():
            raise UserError(f"{flag}: eco-llm runs from {_PACKAGE_ROOT}, which is not a git checkout")
        found = _git(_PACKAGE_ROOT, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if found.returncode:
            raise UserError(f"{flag} {name!r} is no revision of {_PACKAGE_ROOT}")
        commit = found.stdout.strip()
        if _git(_PACKAGE_ROOT, "cat-file", "-e", f"{commit}:eco_llm/__main__.py").returncode:
            raise UserError(f"{flag} {name!r} has no eco_llm/__main__.py, so it cannot be started")
        return Revision(name, commit, _PACKAGE_ROOT)

    @contextlib.contextmanager
    def checked_out(self) -> Iterator[Path]:
        """Check it out with `git worktree` in a temporary folder; remove both afterwards."""
        with tempfile.TemporaryDirectory(prefix="eco_llm_revision_", ignore_cleanup_errors=True) as folder:
            root = Path(folder) / self.commit[:12]
            added = _git(self.repository, "worktree", "add", "--detach", str(root), self.commit)
            try:
                if added.returncode:
                    raise UserError(f"git cannot check out {self.name}: {' '.join(added.stderr.split())}")
                yield root
            finally:
                _git(self.repository, "worktree", "remove", "--force", str(root))
                shutil.rmtree(root, ignore_errors=True)
                _git(self.repository, "worktree", "prune")


def turns_protocol(root: Path) -> int | None:
    """Which protocol of proof/turns.py a checkout speaks; None if it cannot take turns."""
    try:
        text = (root / "eco_llm" / "proof" / "turns.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^PROTOCOL = (\d+)$", text, re.M)
    return int(found[1]) if found else None


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
