"""Proof: sweeps, comparisons, reports. Starts runs as processes, reads run directories, never imports training."""
