"""Proof: sweeps, comparisons and reports. Starts runs as processes and reads run directories; never imports training."""
