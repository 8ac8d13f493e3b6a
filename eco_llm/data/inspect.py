"""What a prepared data set holds, for `eco_train data inspect`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from eco_llm.data.shards import MANIFEST, PreparedData, open_prepared
from eco_llm.data.split import SPLITS
from eco_llm.errors import UserError

_SHOWN_TOKENS = 64


def describe(path: Path, *, verify: bool = True, samples: int = 3) -> dict[str, Any]:
    """Counts, splits, skips and the first documents of a prepared data set, as plain values for JSON.

    Args:
        path: its folder, or the manifest.json in it.
        verify: compare every checksum; `verified` says whether that was done.
        samples: documents shown per split, by the text of their first 64 tokens.

    Raises:
        UserError: not a prepared data set, or a damaged one.
    """
    folder = path.parent if path.name == MANIFEST else path
    if not (folder / MANIFEST).is_file() and folder.is_dir():
        inside = sorted(p.name for p in folder.iterdir() if (p / MANIFEST).is_file() and p.name[0] != ".")
        if inside:
            raise UserError(f"{folder}: a cache of prepared data sets; name one of them: {', '.join(inside)}")
    data = open_prepared(folder, verify=verify)
    manifest = data.manifest
    return {
        "path": str(folder),
        "key": manifest.key,
        "verified": verify,
        "sources": list(manifest.sources),
        "text_field": manifest.text_field,
        "dtype": manifest.dtype,
        "tokenizer": {
            "vocab_size": manifest.vocab_size,
            "end_of_text_id": manifest.eot_id,
            "lossless": manifest.tokenizer_lossless,
            "fingerprint": manifest.tokenizer_fingerprint,
        },
        "split_mode": manifest.split_plan.mode,
        "splits": {name: _split(data, name, samples) for name in SPLITS},
        "skips": manifest.skips.to_dict(),
    }


def _split(data: PreparedData, name: str, samples: int) -> dict[str, Any]:
    info = data.manifest.splits[name]
    tokens = data.tokens(name)
    starts = [*itertools.islice(data.document_starts(name), samples + 1)]
    first = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        ids = np.empty(min(end - start, _SHOWN_TOKENS), dtype=np.int64)
        tokens.read(start, ids)
        first.append(data.tokenizer.decode(ids.tolist()))
    return {
        "documents": info.documents,
        "tokens": info.tokens,
        "text_bytes": info.text_bytes,
        "bytes_per_token": round(info.bytes_per_token, 4),
        "shards": len(info.shards),
        "first_documents": first[:samples],
    }
