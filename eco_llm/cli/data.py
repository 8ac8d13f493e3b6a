"""`eco_train data prepare` and `eco_train data inspect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eco_llm.cli.parse import parse
from eco_llm.config import PrepareConfig
from eco_llm.errors import UserError

ACTIONS = {
    "prepare": "Read, split, tokenise and store a corpus (training does the same when it must).",
    "inspect": "Show what a prepared corpus holds: counts, splits, what was skipped, first documents.",
}
_USAGE = "usage: eco_train data prepare|inspect [FLAGS]\n\n" + "\n".join(f"  {k:<8} {v}" for k, v in ACTIONS.items())


def run(args: Sequence[str]) -> int:
    """Prepare a corpus, or describe a prepared one."""
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    action, *rest = args
    if action not in ACTIONS:
        raise UserError(f"eco_train data {action!r} is not one of {', '.join(ACTIONS)}")
    config = parse(PrepareConfig, rest, prog=f"eco_train data {action}", description=ACTIONS[action])
    config.validate()
    # Imported here and not above: help has ended by now, and is quicker without.
    from eco_llm.data.inspect import describe
    from eco_llm.data.prepare import prepare
    from eco_llm.data.progress import make_progress

    if action == "prepare":
        if config.path or config.verify:
            raise UserError("--path and --verify belong to `eco_train data inspect`")
        data = prepare(config.data, config.vocab_size, progress=make_progress(), repair=True)
        report = describe(data.path, verify=False)
    else:
        report = describe(_folder(config), verify=config.verify)
    if config.json:
        print(json.dumps(report))  # ASCII: a pipe may have any encoding
    else:
        _show(report)
    return 0


def _folder(config: PrepareConfig) -> Path:
    if config.path:
        return Path(config.path)
    from eco_llm.data.prepare import cache_key
    from eco_llm.data.sources import check_sources
    from eco_llm.data.tokenizer import TRAIN, Tokenizer

    check_sources(config.data)
    given = None if config.data.tokenizer == TRAIN else Tokenizer.load(Path(config.data.tokenizer))
    folder = Path(config.data.data_cache) / cache_key(config.data, config.vocab_size, given)
    if not folder.is_dir():
        raise UserError(
            f"{' '.join(config.data.data)} has not been prepared with these settings (`eco_train data prepare`)"
        )
    return folder


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    tokenizer = report["tokenizer"]
    console.print(f"{report['path']}  ({'checksums verified' if report['verified'] else 'checksums not read'})")
    console.print(f"sources: {' '.join(report['sources'])}; tokens stored as {report['dtype']}", markup=False)
    console.print(f"tokenizer: {tokenizer['vocab_size']:,} tokens, end of text {tokenizer['end_of_text_id']}")
    columns = ("documents", "tokens", "text_bytes", "bytes_per_token", "shards")
    table = Table("split", *columns)
    for name, split in report["splits"].items():
        table.add_row(name, *(f"{split[c]:,}" for c in columns))
    console.print(table)
    for reason, skip in report["skips"].items():
        console.print(f"skipped, {reason}: {skip}", markup=False)
    for name, split in report["splits"].items():
        for text in split["first_documents"]:
            console.print(f"{name}: {text[:100]!r}", markup=False)
