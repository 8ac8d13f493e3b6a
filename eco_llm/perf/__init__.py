"""Measurement: phase timers, perf windows, device counters, the profiler, and what machine it all ran on.

Imports nothing of training, cli or model: it is told times and writes JSON. What every number means is in
docs/perf.md. Submodules are imported by name; `environment`, `files` and `nvml` do not import torch.
"""
