"""Sweeps, comparisons and reports: read run directories, never import training."""
