"""RMSNorm of the residual stream with the addition before it, kept for backward as codes of its result alone.

Maths and bytes: README.md beside this file. No autograd of its own: `ops.coded_layers` calls both directions.
"""
