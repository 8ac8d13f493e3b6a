# mypy: allow-untyped-defs
"""The rule's arithmetic on elements: clip, moments, direction.

Every multiply-add is written as one and both passes over the moments use the same functions, so that all forms of the
update give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eco_llm.optim.c3o_kernels.codes import _pattern, _ratio

LEAST = tl.constexpr(1.1754944e-38)
"""The smallest normal float32."""


@triton.jit
def _root(v):
    """sqrt(v) within 2 units in the last place; 0 of what is subnormal."""
    return v * tl.rsqrt(tl.maximum(v, LEAST))


@triton.jit
def _quotient_fast(m, root, gain, shift):
    """`_quotient` within a few units in the last place: beside moments of 16 bits or fewer, arithmetic is a cost."""
    inverse = tl.rsqrt(tl.fma(root, gain, shift))
    return m * inverse * inverse


@triton.jit
def _clipped(g, factor, limit, CLAMP: tl.constexpr):
    g = g * factor
    if CLAMP:  # comparisons with NaN are false: it stays
        g = tl.where(g > limit, limit, g)
        g = tl.where(g < -limit, -limit, g)
    return g


@triton.jit
def _advance(g, m, v, w1, b2, w2):
    return tl.fma(w1, g - m, m), tl.fma(w2 * g, g, b2 * v)


@triton.jit
def _advance_coded(
    g, r_code, v_code, r_scale, v_scale, w1, b2, w2, R: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """`_advance` of `storage.coded_moments`, with v at least LEAST, so that it has a root.

    Of a group's scales all that is one number is multiplied by row: sqrt(v) = sqrt(z) sqrt(scale), and z is never 0.
    """
    z = _pattern(v_code, V)
    m = _ratio(r_code, (1 - w1) * (r_scale * _root(v_scale)), R, BITS) * (z * tl.rsqrt(z))
    return tl.fma(w1, g, m), tl.fma(w2 * g, g, tl.fma(z, b2 * v_scale, LEAST))


@triton.jit
def _quotient(m, v, gain, shift):
    """m over its corrected root: u, if gain and shift are the plan's."""
    return tl.div_rn(m, tl.fma(tl.sqrt_rn(v), gain, shift))


@triton.jit
def _quotient_beside(m, v, gain, shift, S: tl.constexpr):
    """The quotient, as exact as it comes free beside moments stored as S: at 32 bits memory takes longer."""
    if S.primitive_bitwidth == 32:
        return _quotient(m, v, gain, shift)
    if S.primitive_bitwidth == 16:
        return _quotient_fast(m, _root(v), gain, shift)
    return _quotient_fast(m, v * tl.rsqrt(v), gain, shift)  # `_advance_coded` has none below LEAST


@triton.jit
def _direction(p, g, m, v, lead, gain, shift, decay, S: tl.constexpr, NESTEROV: tl.constexpr):
    """d = u + decay · p. Nesterov costs one multiply-add: what else it scales is in the plan's gain and shift."""
    if NESTEROV:
        m = tl.fma(lead, m, g)
    return tl.fma(decay, p, _quotient_beside(m, v, gain, shift, S))
