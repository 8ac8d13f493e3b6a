"""INSTANT: what a stack of blocks keeps for backward. docs/instant.md says what each mode costs and proves.

Not the low-rank training method that was published under the same name in 2026.
"""
