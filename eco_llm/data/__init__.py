"""Corpus → tokenizer → memory-mapped shards → resumable loader.

sources.py    --data entries → files → documents (formats.py reads one file, documents.py is what comes out)
tokenizer.py  byte-level BPE, trained here or loaded
split.py      which part of the corpus is held out
shards.py     tokens on disk: manifest, checksums, atomic commit
prepare.py    the pipeline, cached by content (progress.py shows it)
order.py      which window comes when: a pure function of (seed, epoch, position)
loader.py     batches in that order, prefetched; the only module here that imports torch
inspect.py    what a prepared data set holds, for people
"""
