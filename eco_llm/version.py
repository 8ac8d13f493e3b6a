"""The version, importable without importing anything else (the build reads it)."""

__version__ = "0.1.0"
