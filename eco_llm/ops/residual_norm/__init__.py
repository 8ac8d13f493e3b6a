"""RMSNorm of the residual stream with the addition before it, kept for backward as codes of its result alone.

Maths and bytes: README.md beside this file. No autograd of its own: `ops.mamba_mixer.coded`, `ops.swiglu.coded`
and `instant.coded` call both directions. Where everything is kept, `ops.add_norm` does the same with no codes.
"""
