"""How the two moments are stored: as they are (float types), or as codes of 8 or 4 bits with a scale per group.

    name        bytes per parameter, both moments      scale
    float32     8
    bfloat16    4
    int8        2 · (1 + 2/64)   = 2.0625              one bfloat16 per 64 elements and moment
    int4        2 · (1/2 + 2/64) = 1.0625              the same

What is coded is what the update needs, u = m / sqrt(v):

- v by a float code without a sign: equal steps per octave, so that the relative error does not depend on how far v is
  below its group's largest. Code 0 is the smallest step, not 0: v is never read back as 0 where it was not.
- not m but r = m / sqrt(v as it will be read back), which m is read back from. Elements of a group differ in the size
  of their gradients by orders of magnitude; r does not, because Adam bounds it. A code of m gives a small element an
  error in units of the group's largest, which sqrt(v) then divides: it is the error that makes low-bit moments diverge.

Both are leading bits of a float32 pattern, so coding is an addition and a shift, with the discarded bits dithered as in
`rounding`: z = |x| / s (+ 1 where 0 is a value), code = pattern(z) >> (23 - mantissa), less that of 1. Unbiased: v, and
given v also m, read back right on average over steps. Measured against the alternatives: docs/c3o.md, "State".

An element's group, and with 4 bits its partner in the byte, follow from its row-major index: byte j of pair i holds
element j of groups 2i (low bits) and 2i + 1 (high bits). No layout converts in registers then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from eco_llm.optim.rounding import FIRST_MOMENT, RATIO, SECOND_MOMENT, dithered_bfloat16, thresholds

GROUP = 64
"""Elements that share a scale."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")


@dataclass(frozen=True)
class Code:
    """A float code relative to a group's scale."""

    signed: bool
    """Codes a sign and |x| with 0 among the values; unsigned: x >= 0, read back as at least one scale."""
    mantissa: int
    """Mantissa bits: 2^mantissa steps an octave."""
    levels: int
    """Magnitudes."""

    @property
    def base(self) -> int:
        """Pattern of 1.0, shifted."""
        return 127 << self.mantissa

    @property
    def span(self) -> float:
        """Largest magnitude, in scales."""
        pattern = (self.base + self.levels - 1) << (23 - self.mantissa)
        return torch.tensor(pattern, dtype=torch.int32).view(torch.float32).item() - self.signed


@dataclass(frozen=True)
class Storage:
    """One way to store both moments."""

    name: str
    """In parameter groups (state dicts hold no torch objects)."""
    dtype: torch.dtype
    """Of `exp_avg` and `exp_avg_sq` as tensors."""
    bits: int = 0
    """Of a code; 0: stored as numbers of `dtype`."""
    ratio: Code | None = None
    """Code of r = m / sqrt(v)."""
    second: Code | None = None
    """Code of v."""

    @property
    def number(self) -> torch.dtype:
        """Floating type that the moments' arithmetic must at least have."""
        return torch.float32 if self.bits else self.dtype

    def code_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of a stored moment of a tensor of `shape`."""
        if self.bits == 4:
            return (-(-shape.numel() // (2 * GROUP)) * GROUP,)
        return tuple(shape)


STORAGES = {
    s.name: s
    for s in (
        Storage("float32", torch.float32),
        Storage("bfloat16", torch.bfloat16),
        Storage("float64", torch.float64),
        Storage("int8", torch.uint8, 8, Code(True, 5, 128), Code(False, 3, 256)),
        Storage("int4", torch.uint8, 4, Code(True, 2, 8), Code(False, 1, 16)),
    )
}


class Stored(NamedTuple):
    """Both moments as they are kept; scales are None where there are no codes."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None


# ---- codes of rows of one group each ------------------------------------------------------------------------------


def encode(x: Tensor, threshold: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Codes of [rows, GROUP] float32: uint8 of that shape, and their scales, bfloat16 [rows].

    Args:
        threshold: int32, of x's shape, in [0, 2^16).

    A group whose scale would be subnormal has scale 0. A NaN or infinity makes the whole group not finite.
    """
    shift = 23 - code.mantissa
    bits = (x.view(torch.int32) & 0x7FFFFFFF).amax(1)  # as integers, because a maximum of floats may drop a NaN
    top = bits.view(torch.float32) * (1 / code.span)
    bits = (top.view(torch.int32) & 0x7FFFFFFF).clamp_(max=0x7FC00000)
    bits = (bits + 0xFFFF).bitwise_and_(-0x10000)  # up, so that no element is beyond the last code
    scale = torch.where(bits < 0x00800000, 0, bits).view(torch.float32)
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)[:, None]
    z = x.abs() * inverse
    z = z + 1 if code.signed else z.clamp_(min=1)
    raised = z.view(torch.int32) + (threshold << (shift - 16))
    codes = ((raised >> shift) - code.base).clamp_(0, code.levels - 1)
    if code.signed:
        codes += torch.signbit(x).to(torch.int32) * code.levels
    return codes.to(torch.uint8), scale.to(torch.bfloat16)


def decode(codes: Tensor, scale: Tensor, code: Code) -> Tensor:
    """float32 [rows, GROUP] from what `encode` made."""
    scale = scale.to(torch.float32)[:, None]
    magnitude = codes.to(torch.int32) & (code.levels - 1)
    z = ((magnitude + code.base) << (23 - code.mantissa)).view(torch.float32)
    if not code.signed:
        return z * scale
    x = (z - 1) * scale
    return torch.where(codes >= code.levels, -x, x)


def code_moments(m: Tensor, v: Tensor, position: Tensor, step: Tensor, storage: Storage) -> tuple[Stored, Tensor]:
    """Store both moments of whole groups.

    Args:
        m, v: [groups, GROUP]; an even number of groups; 0 where there is no element.
        position: index of each element within its credit block, broadcast to m.
        step: step count, likewise.

    Returns:
        What is kept, codes as [groups, GROUP] or packed [groups / 2, GROUP]; and r as it will be read back.
    """
    assert storage.ratio is not None
    assert storage.second is not None
    m, v = m.to(torch.float32), v.to(torch.float32)
    position = position.expand(m.shape)
    v_codes, v_scale = encode(v, thresholds(position, step, SECOND_MOMENT), storage.second)
    root = decode(v_codes, v_scale, storage.second).sqrt_()
    r = torch.where(root == 0, m * 0.0, m / root)  # v is 0 only where its whole group reads back as 0
    r_codes, r_scale = encode(r, thresholds(position, step, RATIO), storage.ratio)
    kept = decode(r_codes, r_scale, storage.ratio)
    if storage.bits == 4:
        r_codes, v_codes = (c[0::2] | c[1::2] << 4 for c in (r_codes, v_codes))
    return Stored(r_codes, v_codes, r_scale, v_scale), kept


def coded_moments(stored: Stored, storage: Storage) -> tuple[Tensor, Tensor]:
    """(m, v) as float32 [groups, GROUP] from what `code_moments` kept, in its shapes."""
    assert storage.ratio is not None
    assert storage.second is not None
    assert stored.exp_avg_scale is not None
    assert stored.exp_avg_sq_scale is not None
    codes = [c.view(-1, GROUP) for c in stored[:2]]
    if storage.bits == 4:
        codes = [torch.stack((c & 15, c >> 4), 1).view(-1, GROUP) for c in codes]
    v = decode(codes[1], stored.exp_avg_sq_scale, storage.second)
    return decode(codes[0], stored.exp_avg_scale, storage.ratio) * v.sqrt(), v


# ---- one tensor ---------------------------------------------------------------------------------------------------


def new_moments(param: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Zero moments of one tensor, by their names in its state."""
    shape = storage.code_shape(param.shape)
    state = {name: torch.zeros(shape, dtype=storage.dtype, device=param.device) for name in MOMENTS}
    if storage.bits:
        groups = -(-param.numel() // GROUP)
        state |= {name: torch.zeros(groups, dtype=torch.bfloat16, device=param.device) for name in SCALES}
    return state


def storage_of(state: dict[str, Any], storage: Storage) -> Storage:
    """How a state that `check_moments` passed is stored: a float type that was loaded stays, whatever the setting."""
    return storage if storage.bits else STORAGES[str(state["exp_avg"].dtype).removeprefix("torch.")]


def check_moments(state: dict[str, Any], param: Tensor, storage: Storage) -> None:
    """Raise RuntimeError if a state was saved in another way than `storage` and cannot simply be converted."""
    coded = "exp_avg_scale" in state
    if coded != bool(storage.bits) or state["exp_avg"].shape != storage.code_shape(param.shape):
        raise RuntimeError(
            f"C3O: moments of shape {tuple(state['exp_avg'].shape)} and type {state['exp_avg'].dtype} of a parameter"
            f" of shape {tuple(param.shape)} are not {storage.name}; keep the state_dtype that they were saved with"
        )


def read_moments(state: dict[str, Any], param: Tensor, storage: Storage, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(m, v) of one tensor, in its shape."""
    if not storage.bits:
        return state["exp_avg"].to(dtype), state["exp_avg_sq"].to(dtype)
    n = param.numel()
    groups = -(-n // (2 * GROUP)) * 2
    size = groups * GROUP * storage.bits // 8
    kept = [state[name].reshape(-1) for name in (*MOMENTS, *SCALES)]
    kept = [pad(x, (0, full - x.numel())) for x, full in zip(kept, (size, size, groups, groups), strict=True)]
    m, v = coded_moments(Stored(*kept), storage)
    return m.view(-1)[:n].view(param.shape).to(dtype), v.view(-1)[:n].view(param.shape).to(dtype)


def stored_moments(
    m: Tensor, v: Tensor, step: Tensor, storage: Storage, block: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What `state` holds of one tensor's moments after `step`; and the norm of r as kept, None where it is not coded.

    Args:
        block: elements after which positions, hence thresholds, start again.
    """
    shape, n = m.shape, m.numel()
    if not storage.bits:
        kept = m.to(storage.dtype), v.to(storage.dtype)
        if storage.dtype == torch.bfloat16:
            position = torch.arange(n, device=m.device).view(shape) % block
            kept = (
                dithered_bfloat16(m, position, step, FIRST_MOMENT),
                dithered_bfloat16(v, position, step, SECOND_MOMENT),
            )
        return dict(zip(MOMENTS, kept, strict=True)), None
    m, v = (pad(x.reshape(-1), (0, -n % (2 * GROUP))).view(-1, GROUP) for x in (m, v))
    position = torch.arange(m.numel(), device=m.device).view(m.shape) % block
    stored, r = code_moments(m, v, position, step, storage)
    result = {name: codes.view(-1) for name, codes in zip(MOMENTS, stored[:2], strict=True)}
    if storage.bits == 8:
        result = {name: codes[:n].view(shape) for name, codes in result.items()}
    groups = -(-n // GROUP)
    result |= {name: scale[:groups] for name, scale in zip(SCALES, stored[2:], strict=True) if scale is not None}
    return result, torch.linalg.vector_norm(r)
