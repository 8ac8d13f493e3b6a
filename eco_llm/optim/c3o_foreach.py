"""C3O for many tensors at once: the same rule in a number of launches that does not grow with the tensors.

Moments live in an `Arena`: one padded buffer [blocks, BLOCK] per moment, in which every tensor starts at a block of
its own; `state[param]["exp_avg"]` is a view of it. A scalar per tensor or per block (bias correction, credit, trust
scale) then becomes one broadcast over rows, and only operations that mix in parameters or gradients, which are not
ours to lay out, are `torch._foreach_*` lists. A `Bucket` is a run of neighbours in one arena that step together.

Accesses to memory, per element and step (16-bit or 32-bit words; fp32 moments, no credit, no clip):
    m <- lerp(m, g) 3;  v <- b2 v 2;  v += (1-b2) g² 3;  sqrt 2;  · + broadcast 2;  m / · 3;  + λθ 3;  |d|, |θ| 2;
    · scale 2;  θ - · 3;  together 25, of which the trust region is 2 and weight decay 3. A step that may be
    skipped (`skip_step`) adds 8: candidates for m and v are built in the work buffer and committed by `where`. A
    sphere adds 6: θ copied 2, the products 4, θ · shrink added 3, less weight decay. Nesterov adds 5: m · 2, + g 3;
    with the norm skip and plain moments 4 more, for the norm of the direction without it. In host memory the first 15
    are 8, and Nesterov adds 3: PyTorch's fused Adam makes the direction (`_direction_by_adam`).

Coded moments (int8, int4) are decoded into a work buffer, advanced and coded anew, with some temporaries of the
bucket's size in float32 and int32: no copy in float32 outlives the bucket's step.

A device flag cannot save these norms their two accesses: without a kernel of our own a launch is issued or not by
Python, before the flag is known. Here `may_skip` decides, counts and keeps its bounds exactly as a kernel must, and
the scale it implies is the one applied; the time is saved only by the kernel that reads the flag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eco_llm.optim.c3o_reference import UNKNOWN_RADIUS, drop_norm_cache, unknown_update_norm
from eco_llm.optim.grads import tensor_norms
from eco_llm.optim.norm_skip import (
    NormCache,
    Slack,
    applied_norm_bound,
    look_ahead,
    may_skip,
    next_cache,
    stored_direction_bound,
    update_norm_bound,
)  # fmt: skip
from eco_llm.optim.rounding import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    WEIGHT,
    Stream,
    dithered_bfloat16,
    joined_weight,
    split_weight,
)
from eco_llm.optim.rule import BLOCK, Rule, block_count, compute_dtype
from eco_llm.optim.storage import (
    GROUP,
    MOMENTS,
    SCALES,
    Stored,
    check_moments,
    code_moments,
    coded_moments,
)  # fmt: skip

StateMap = dict[Tensor, dict[str, Any]]

BUCKET_ELEMENTS = {"cpu": 2**21}
"""Most elements in a bucket of several tensors, by device type; it bounds the work buffers (8 MiB each
on a CPU, 128 MiB elsewhere, or the largest tensor) and is large enough to hide a bucket's scalar work. On a CPU 2^18,
work buffers in the second cache, is slower: 46.7 ms for 41.2 (11M parameters, one thread)."""
_BUCKET_ELEMENTS_DEFAULT = 2**25

LARGE_BLOCKS = 16
"""Blocks from which a tensor in host memory has an arena among its like: `c3o_host` may step it by itself, which costs
some 60 µs of calls; smaller ones share buckets, which fit in the cache."""


class Arena:
    """Moments and caches of tensors alike in device, dtype, state dtype, group and (in host memory) in being large or
    not, laid out back to back.

    Values already in `state` (a checkpoint, the for-loop's) are copied in; `state` then holds views of the arena.
    """

    def __init__(self, params: Sequence[Tensor], rule: Rule, state: StateMap) -> None:
        self.params = list(params)
        self.large = _is_large(params[0])
        self.device, self.param_dtype, self.storage = params[0].device, params[0].dtype, rule.storage
        self.dtype = compute_dtype(params[0], rule.storage)
        self.blocks = [block_count(p.numel()) for p in params]
        self.first = [0]
        for b in self.blocks:
            self.first.append(self.first[-1] + b)
        rows = self.first[-1]
        self._width = BLOCK // 2 if self.storage.bits == 4 else BLOCK  # of a row in memory
        self.exp_avg = torch.zeros(rows, self._width, dtype=self.storage.dtype, device=self.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.scales: tuple[Tensor, Tensor] | None = None
        if self.storage.bits:
            scales = torch.zeros(2, rows, BLOCK // GROUP, dtype=torch.bfloat16, device=self.device)
            self.scales = scales[0], scales[1]
        self.step = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.error: Tensor | None = None
        self.credit: Tensor | None = None
        self.cache: NormCache | None = None
        self.sphere_radius: Tensor | None = None
        for i, p in enumerate(params):
            if "exp_avg" in state[p]:
                check_moments(state[p], p, self.storage)
            for name, codes in zip(MOMENTS, (self.exp_avg, self.exp_avg_sq), strict=True):
                self._adopt(state[p], name, self.moment_view(codes, i))
            for name, scales in zip(SCALES, self.scales or (), strict=bool(self.scales)):
                first = self.first[i] * (BLOCK // GROUP)
                self._adopt(state[p], name, scales.view(-1)[first : first - (-p.numel() // GROUP)])
            self._adopt(state[p], "step", self.step[i])

    @staticmethod
    def _adopt(state: dict[str, Any], name: str, home: Tensor) -> None:
        if name in state:
            home.copy_(state[name])
        state[name] = home

    def view(self, rows: Tensor, i: int, start: int = 0) -> Tensor:
        """Tensor i's elements, shaped as the parameter, in a buffer whose row 0 is the arena's row `start`."""
        p, first = self.params[i], self.first[i] - start
        return rows.view(-1)[first * BLOCK : first * BLOCK + p.numel()].view(p.shape)

    def moment_view(self, rows: Tensor, i: int) -> Tensor:
        """Tensor i's part of a moment of the whole arena, in the shape of its state."""
        shape = self.storage.code_shape(self.params[i].shape)
        start = self.first[i] * self._width
        return rows.view(-1)[start : start + math.prod(shape)].view(shape)

    def require(self, rule: Rule, state: StateMap) -> None:
        """Create what features that are on need, and drop what would age while theirs is off."""
        if not rule.keeps_error(self.param_dtype):
            self.error = None
            for p in self.params:
                state[p].pop("error", None)
        elif self.error is None:
            self.error = torch.zeros(self.first[-1], BLOCK, dtype=torch.int8, device=self.device)
            for i, p in enumerate(self.params):
                self._adopt(state[p], "error", self.view(self.error, i))
        if rule.has_credit and self.credit is None:
            self.credit = torch.zeros(self.first[-1], dtype=self.dtype, device=self.device)
            for i, p in enumerate(self.params):
                self._adopt(state[p], "credit", self.credit[self.first[i] : self.first[i + 1]])
        if not rule.has_sphere:
            self.sphere_radius = None
            for p in self.params:
                state[p].pop("sphere_radius", None)
        elif self.sphere_radius is None:
            self.sphere_radius = torch.full_like(self.step, UNKNOWN_RADIUS, dtype=self.dtype)
            for i, p in enumerate(self.params):
                self._adopt(state[p], "sphere_radius", self.sphere_radius[i])
        if not rule.may_skip_norms:
            self.cache = None
            for p in self.params:
                drop_norm_cache(state[p])
        elif self.cache is None:
            zeros = torch.zeros(len(self.params), dtype=self.dtype, device=self.device)
            self.cache = NormCache(unknown_update_norm(self.step.to(self.dtype)), zeros, self.step * 0)
            for i, p in enumerate(self.params):
                for name, values in self.cache._asdict().items():
                    self._adopt(state[p], name, values[i])


class Workspace:
    """Scratch rows of one device and dtype, shared by the buckets that step one after another; never zeroed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._rows = 0
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, rows: int) -> None:
        """Make every buffer at least `rows` long; called before any is handed out."""
        self._rows = max(self._rows, rows)

    def rows(self, name: str, rows: int) -> Tensor:
        """The buffer `name`, cut to [rows, BLOCK]; contents are whatever the last user left."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._rows, BLOCK, dtype=self._dtype, device=self._device)
        return self._buffers[name][:rows]


class Bucket:
    """Tensors first..last-1 of an arena: views of their state, and the constants that their step needs."""

    def __init__(self, arena: Arena, first: int, last: int, group: dict[str, Any], workspace: Workspace) -> None:
        self.group, self.arena, self.workspace = group, arena, workspace
        self.params = arena.params[first:last]
        self.span = (first, last)
        start, stop = arena.first[first], arena.first[last]
        self.rows = stop - start
        workspace.reserve(self.rows)
        self.exp_avg, self.exp_avg_sq = arena.exp_avg[start:stop], arena.exp_avg_sq[start:stop]
        self.step = arena.step[first:last]
        self.exp_avg_views = [arena.moment_view(arena.exp_avg, i) for i in range(first, last)]
        self.exp_avg_sq_views = [arena.moment_view(arena.exp_avg_sq, i) for i in range(first, last)]
        self.stored: Stored | None = None
        if arena.scales is not None:
            self.stored = Stored(self.exp_avg, self.exp_avg_sq, *(x[start:stop].view(-1) for x in arena.scales))
        self.error = None if arena.error is None else arena.error[start:stop]
        self.credit = None if arena.credit is None else arena.credit[start:stop]
        self.cache = None if arena.cache is None else NormCache(*(x[first:last] for x in arena.cache))
        self.sphere_radius = None if arena.sphere_radius is None else arena.sphere_radius[first:last]

        device, dtype = arena.device, arena.dtype
        counts = arena.blocks[first:last]
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        self.owner = torch.tensor(owners, device=device)
        self.block_counts = torch.tensor(counts, dtype=dtype, device=device)
        self.sqrt_n = torch.tensor([p.numel() ** 0.5 for p in self.params], dtype=dtype, device=device)
        self.position = torch.arange(BLOCK, device=device)
        # The last row of each tensor, and which of its elements there are: codes must not see the others.
        self.last_rows = torch.tensor([arena.first[i + 1] - 1 - start for i in range(first, last)], device=device)
        counts_there = [p.numel() - BLOCK * (n - 1) for p, n in zip(self.params, counts, strict=True)]
        self.present = self.position < torch.tensor(counts_there, device=device)[:, None]
        self.zero = torch.zeros((), dtype=dtype, device=device)
        self.slack = Slack.of(arena.storage, arena.param_dtype, dtype)
        self.counts = counts
        self.cosines = torch.empty(self.rows, dtype=dtype, device=device)
        self.cosine_views = list(self.cosines.split(counts))
        self._work: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def work(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Scratch `name`: [rows, BLOCK], and one view of it a tensor. Padding holds leftovers."""
        if name not in self._work:
            rows = self.workspace.rows(name, self.rows)
            first, last = self.span
            start = self.arena.first[first]
            self._work[name] = (rows, [self.arena.view(rows, i, start) for i in range(first, last)])
        return self._work[name]


def foreach_step(bucket: Bucket, grads: list[Tensor], rule: Rule, skip_step: Tensor | None) -> Tensor:
    """One C3O step of a bucket, in place on its parameters and state.

    Args:
        grads: one a parameter, already unscaled and clipped; not modified.
        rule: the bucket's group, now.
        skip_step: None, or a 0-dim bool on the device; True leaves every bit of parameters and state alone,
            whatever the gradients hold.

    Returns:
        float32 [4]: tensors whose norm was skipped, was exact, whose cap bound, and the sum over tensors of
        |Δ| / max(|θ|, floor), or ρ on the sphere; zeros with neither.
    """
    dtype = bucket.arena.dtype
    if any(g.dtype != dtype for g in grads):
        grads = _cast(bucket, "grad", grads)
    params = bucket.params
    if bucket.arena.param_dtype != dtype:
        params = _cast(bucket, "param", params)
    if bucket.error is not None:
        rows, _ = bucket.work("param")
        rows.copy_(joined_weight(rows, bucket.error))

    t = bucket.step + 1
    bias1, bias2 = bias_correction(rule.beta1, t.to(dtype)), bias_correction(rule.beta2, t.to(dtype))
    factor = _credit_factors(bucket, grads, rule, skip_step) if rule.has_credit else None

    ratio = plain_norm = None
    watches_plain = rule.nesterov and rule.may_skip_norms
    if adam_serves(bucket, grads, rule):
        d, d_views = _direction_by_adam(bucket, grads, rule, t, skip_step)
        if factor is not None:
            d.mul_(factor[:, None])
        m = bucket.exp_avg
        if watches_plain:
            root = torch.sqrt(bucket.exp_avg_sq, out=bucket.work("plain")[0])
            plain_norm = _plain_norm(bucket, m, _corrected(root, bucket, bias1, bias2, factor, rule))
    else:
        m, root, d_views, ratio = _update_moments(bucket, grads, rule, t, skip_step)
        _corrected(root, bucket, bias1, bias2, factor, rule)
        if watches_plain and ratio is None:
            plain_norm = _plain_norm(bucket, m, root)
        if rule.nesterov:
            m = _ahead(bucket, m, grads, bias1, rule)
        d = torch.div(m, root, out=root)
    if rule.has_sphere:
        scale, stats = _onto_sphere(bucket, params, d, d_views, rule, skip_step)
    else:
        if rule.weight_decay:
            torch._foreach_add_(d_views, params, alpha=rule.weight_decay)
        scale, stats = _trust(bucket, params, d_views, t, bias1, bias2, plain_norm, ratio, rule, skip_step)
    if skip_step is not None:
        scale = torch.where(skip_step, 0.0, scale)
        # Made with the bad gradient or divided by a norm, and 0 times inf is NaN.
        if m is not bucket.exp_avg or factor is not None or rule.has_sphere:
            d.masked_fill_(skip_step, 0.0)
    # 0 + x·0 is +0 for either sign of x, and θ - (+0) is θ in every bit, -0 included.
    torch.addcmul(bucket.zero, d, scale[bucket.owner][:, None], out=d)
    torch._foreach_sub_(params, d_views)
    if params is not bucket.params:
        torch._foreach_copy_(bucket.params, _stored_weights(bucket, params, rule, t))
    _commit(bucket.step, t, skip_step)
    return stats


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t for t >= 1, accurate also where beta^t is close to 1."""
    return -torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf))


def _cast(bucket: Bucket, name: str, tensors: list[Tensor]) -> list[Tensor]:
    _, views = bucket.work(name)
    torch._foreach_copy_(views, tensors)
    return views


def _stored_weights(bucket: Bucket, params: list[Tensor], rule: Rule, t: Tensor) -> list[Tensor]:
    """What the parameters become, from their new values in the work buffer "param". Refused steps change no bit."""
    arena = bucket.arena
    if arena.param_dtype != torch.bfloat16 or not rule.dithers_weights:
        return params
    rows, _ = bucket.work("param")
    step = t[bucket.owner][:, None]
    if bucket.error is None:
        rounded = dithered_bfloat16(rows, bucket.position, step, WEIGHT)
    else:
        rounded, error = split_weight(rows, bucket.position, step)
        bucket.error.copy_(error)
    first, last = bucket.span
    return [arena.view(rounded, i, arena.first[first]) for i in range(first, last)]


def _commit(old: Tensor, new: Tensor, skip_step: Tensor | None) -> None:
    # where, not arithmetic: NaN * 0 is NaN.
    if skip_step is None:
        old.copy_(new)
    else:
        torch.where(skip_step, old, new.to(old.dtype), out=old)


def adam_serves(bucket: Bucket, grads: list[Tensor], rule: Rule) -> bool:
    """Whether PyTorch's fused Adam can advance the moments: host memory, where it takes no strides into account. With
    Nesterov b1 must not be so small that the new m lies far beyond what Adam leaves: rounding errors grow with that.
    """
    arena = bucket.arena
    return (
        arena.device.type == "cpu"
        and bucket.stored is None
        and arena.storage.dtype == arena.dtype == arena.param_dtype
        and all(g.is_contiguous() for g in grads)
        and (not rule.nesterov or rule.beta1 >= 0.5)
    )


def _direction_by_adam(
    bucket: Bucket, grads: list[Tensor], rule: Rule, t: Tensor, skip_step: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Advance both moments and return u, 0 in a skipped step, as scratch with its views: one pass over memory for six.

    It is an Adam step of rate -1 from parameters that are 0 (`adam_settings`).
    """
    u, u_views = bucket.work("update")
    u.zero_()
    streams = (u_views, grads, bucket.exp_avg_views, bucket.exp_avg_sq_views)
    steps = list(t.unbind())
    ages = t.tolist() if rule.nesterov else [0.0] * len(steps)
    for age in dict.fromkeys(ages):  # one, unless tensors had their first gradients in different steps
        beta1, rate = adam_settings(age, rule)
        us, gs, ms, vs = ([x for x, a in zip(stream, ages, strict=True) if a == age] for stream in streams)
        torch._fused_adam_(
            us, gs, ms, vs, [], [x for x, a in zip(steps, ages, strict=True) if a == age], lr=-rate, beta1=beta1,
            beta2=rule.beta2, weight_decay=0.0, eps=rule.eps, amsgrad=False, maximize=False,
            found_inf=None if skip_step is None else skip_step.to(torch.float32),
        )  # fmt: skip
        if rule.nesterov and not (skip_step is not None and skip_step):
            torch._foreach_lerp_(ms, gs, 1 - rule.beta1 / beta1)
    return u, u_views


def adam_settings(age: float, rule: Rule) -> tuple[float, float]:
    """(b1, -lr) of the Adam step from 0 that makes the direction of a tensor in its step number `age`.

    With Nesterov, l m + (1 - b1) g of the new m is (l + 1 - b1) times a mean of the old m and g: an Adam step with a b1
    of the tensor's age. What it leaves as m is that mean n, and the new m lies on the line through n and g, beyond n:
    lerp(n, g, 1 - rule.beta1 / b1).
    """
    if not rule.nesterov:
        return rule.beta1, 1.0
    exact_age = torch.tensor(age, dtype=torch.float64)
    first = bias_correction(rule.beta1, exact_age)
    ahead = float(look_ahead(first, rule))
    beta1 = ahead * rule.beta1 / (ahead + 1 - rule.beta1)
    return beta1, (ahead + 1 - rule.beta1) * float(bias_correction(beta1, exact_age) / first)


def _update_moments(
    bucket: Bucket, grads: list[Tensor], rule: Rule, t: Tensor, skip_step: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """Advance both moments.

    Returns:
        m, and sqrt(v) as scratch with its views, [rows, BLOCK], compute type; and the norms of r as stored [tensors],
        None where moments are not coded (`storage`).
    """
    m, v = bucket.exp_avg, bucket.exp_avg_sq
    root, root_views = bucket.work("update")
    if bucket.stored is None and bucket.arena.storage.dtype == bucket.arena.dtype:
        if skip_step is None:
            torch._foreach_lerp_(bucket.exp_avg_views, grads, 1 - rule.beta1)
            v.mul_(rule.beta2)
            torch._foreach_addcmul_(bucket.exp_avg_sq_views, grads, grads, value=1 - rule.beta2)
        else:
            root.copy_(m)
            torch._foreach_lerp_(root_views, grads, 1 - rule.beta1)
            torch.where(skip_step, m, root, out=m)
            torch.mul(v, rule.beta2, out=root)
            torch._foreach_addcmul_(root_views, grads, grads, value=1 - rule.beta2)
            torch.where(skip_step, v, root, out=v)
        return m, torch.sqrt(v, out=root), root_views, None

    # Moments stored in fewer bits: the update and this step's direction use the unrounded values.
    wide, wide_views = bucket.work("moment")
    _read_moments(bucket, wide, root)
    torch._foreach_lerp_(wide_views, grads, 1 - rule.beta1)
    root.mul_(rule.beta2)
    torch._foreach_addcmul_(root_views, grads, grads, value=1 - rule.beta2)
    ratio = None
    if bucket.stored is None:
        _commit(m, _stored(wide, bucket, t, FIRST_MOMENT), skip_step)
        _commit(v, _stored(root, bucket, t, SECOND_MOMENT), skip_step)
    else:
        for x in (wide, root):
            x[bucket.last_rows] = torch.where(bucket.present, x[bucket.last_rows], 0.0)
        per_group = (-1, GROUP)
        step = t[bucket.owner].repeat_interleave(BLOCK // GROUP)[:, None]
        position = bucket.position.view(per_group).repeat(bucket.rows, 1)
        new, r = code_moments(wide.view(per_group), root.view(per_group), position, step, bucket.arena.storage)
        for old, value in zip(bucket.stored, new, strict=True):
            assert old is not None
            assert value is not None
            _commit(old, value.view(old.shape), skip_step)
        first, last = bucket.span
        start = bucket.arena.first[first]
        ratio = tensor_norms([bucket.arena.view(r, i, start) for i in range(first, last)], bucket.arena.dtype)
    return wide, root.sqrt_(), root_views, ratio


def _corrected(root: Tensor, bucket: Bucket, bias1: Tensor, bias2: Tensor, factor: Tensor | None, rule: Rule) -> Tensor:
    """sqrt(v) becomes sqrt(v) · gain + shift, in place: s (m/bias1) / (sqrt(v/bias2) + eps) is m over that, one
    broadcast for correction and credit.
    """
    gain, shift = (bias1 / bias2.sqrt())[bucket.owner], (rule.eps * bias1)[bucket.owner]
    if factor is not None:
        gain, shift = gain / factor, shift / factor
    return torch.addcmul(shift[:, None], root, gain[:, None], out=root)


def _plain_norm(bucket: Bucket, m: Tensor, root: Tensor) -> Tensor:
    """[tensors], norms of m / root: of the direction without Nesterov's look ahead."""
    plain, views = bucket.work("plain")
    torch.div(m, root, out=plain)
    return tensor_norms(views, bucket.arena.dtype)


def _ahead(bucket: Bucket, m: Tensor, grads: list[Tensor], bias1: Tensor, rule: Rule) -> Tensor:
    """NAdam's first moment, times `bias1` as plain m is: scratch [rows, BLOCK]."""
    rows, views = bucket.work("moment")
    torch.mul(m, look_ahead(bias1, rule)[bucket.owner][:, None], out=rows)
    torch._foreach_add_(views, grads, alpha=1 - rule.beta1)
    return rows


def _read_moments(bucket: Bucket, m: Tensor, v: Tensor) -> None:
    """Write the stored moments, unrounded, into two work buffers [rows, BLOCK]."""
    if bucket.stored is None:
        m.copy_(bucket.exp_avg)
        v.copy_(bucket.exp_avg_sq)
        return
    for rows, values in zip((m, v), coded_moments(bucket.stored, bucket.arena.storage), strict=True):
        rows.copy_(values.view(rows.shape))


def _stored(x: Tensor, bucket: Bucket, t: Tensor, stream: Stream) -> Tensor:
    if bucket.arena.storage.dtype != torch.bfloat16:
        return x
    return dithered_bfloat16(x, bucket.position, t[bucket.owner][:, None], stream)


def _credit_factors(bucket: Bucket, grads: list[Tensor], rule: Rule, skip_step: Tensor | None) -> Tensor:
    """Advance the credit average and return every block's factor s, [rows]."""
    assert bucket.credit is not None
    dtype = bucket.arena.dtype
    g, g_views = bucket.work("credit_grad")
    g.zero_()  # padding would otherwise hold another bucket's elements
    torch._foreach_copy_(g_views, grads)
    u, _ = bucket.work("update")
    m, _ = bucket.work("moment")
    bias2 = bias_correction(rule.beta2, bucket.step.to(dtype).clamp(min=1))
    _read_moments(bucket, m, u)
    # A positive factor common to a tensor leaves cosines alone, so the first moment needs no correction.
    u.sqrt_().add_((rule.eps * bias2.sqrt())[bucket.owner][:, None])
    torch.div(m, u, out=u)
    g_sq, u_sq = torch.linalg.vector_norm(g, dim=1).square_(), torch.linalg.vector_norm(u, dim=1).square_()
    norms = (g_sq * u_sq).sqrt_()
    dots = g.mul_(u).sum(1)
    # Shifted to [0, 2], so that a multi-tensor 1-norm is the sum over each tensor's blocks: deterministic, one launch.
    torch.add(torch.where(norms > 0, dots / norms, 0.0), 1.0, out=bucket.cosines).clamp_(min=0.0)
    means = torch.stack(torch._foreach_norm(bucket.cosine_views, 1)) / bucket.block_counts
    centred = bucket.cosines - means[bucket.owner]
    average = torch.lerp(bucket.credit, centred, 1 - rule.credit_beta)
    _commit(bucket.credit, average, skip_step)
    return average.mul_(rule.credit_gain).exp_().clamp_(rule.credit_min, rule.credit_max)


def _trust(
    bucket: Bucket,
    params: list[Tensor],
    d_views: list[Tensor],
    t: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    plain_norm: Tensor | None,
    ratio: Tensor | None,
    rule: Rule,
    skip_step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """lr times the trust region's factor, [tensors]; and the step's statistics (see `foreach_step`)."""
    if not rule.has_trust:
        return rule.lr * torch.ones_like(bucket.sqrt_n), torch.zeros(4, dtype=torch.float32, device=t.device)
    dtype = bucket.arena.dtype
    theta_norm, d_norm = tensor_norms(params, dtype), tensor_norms(d_views, dtype)
    weight = torch.maximum(theta_norm, rule.trust_floor * bucket.sqrt_n)
    limit, delta_norm = rule.trust_radius * weight, rule.lr * d_norm
    scale = torch.where(delta_norm > limit, limit / delta_norm, 1.0)
    skip = torch.zeros_like(scale, dtype=torch.bool)
    if rule.may_skip_norms:
        assert bucket.cache is not None
        bound = update_norm_bound(bucket.cache.update_norm, t, bias1, bias2, bucket.sqrt_n, rule, bucket.slack)
        applied = applied_norm_bound(bound, bias1, bias2, bucket.sqrt_n, rule, bucket.slack)
        skip = may_skip(applied, bucket.cache, bucket.sqrt_n, rule)
        scale = torch.where(skip, 1.0, scale)
        stored = None if ratio is None else stored_direction_bound(ratio, bias1, bias2, bucket.slack)
        new = next_cache(
            skip, bound, applied, bucket.cache, d_norm, theta_norm, scale, rule, bucket.slack,
            plain_norm=plain_norm, stored_norm=stored,
        )  # fmt: skip
        for old, value in zip(bucket.cache, new, strict=True):
            _commit(old, value, skip_step)
    ratio = torch.where(weight > 0, delta_norm * scale / weight, 0.0)
    stats = torch.stack([skip, ~skip, scale < 1, ratio]).sum(1, dtype=torch.float32)
    return rule.lr * scale, stats


def _onto_sphere(
    bucket: Bucket, params: list[Tensor], u: Tensor, u_views: list[Tensor], rule: Rule, skip_step: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make of the direction u, in place, d with θ - size · d on the sphere: u + θ (1 - a) / b, and size = b.

    θ' = R (θ - b0 u) / |θ - b0 u| = a θ - b u, b0 = ρ R / |u|; a and b follow from |θ|, |u| and <θ, u>. Where R, u or ρ
    is 0 it is the cap's: d = u + λ θ, with the norm of d from the same three numbers.

    Returns:
        (size [tensors], the step's statistics), as `_trust`.
    """
    dtype, known = bucket.arena.dtype, bucket.sphere_radius
    assert known is not None
    theta, theta_views = bucket.work("param")
    if params is bucket.params:
        torch._foreach_copy_(theta_views, params)
    theta_norm, u_norm = tensor_norms(params, dtype), tensor_norms(u_views, dtype)
    dot = _dots(bucket, theta, u)
    radius = torch.where(known < 0, theta_norm, known)
    _commit(known, radius, skip_step)

    weight = torch.maximum(theta_norm, rule.trust_floor * bucket.sqrt_n)
    d_square = u_norm.square() + rule.weight_decay * (2 * dot + rule.weight_decay * theta_norm.square())
    delta_norm = rule.lr * d_square.clamp_(min=0).sqrt_()
    limit = rule.trust_radius * weight if rule.has_trust else torch.full_like(weight, math.inf)
    scale = torch.where(delta_norm > limit, limit / delta_norm, 1.0)
    ratio = torch.where(weight > 0, delta_norm * scale / weight, 0.0)

    share = rule.sphere * rule.lr
    on_sphere = (radius > 0) & (u_norm > 0) & (share > 0)
    now, along = theta_norm / radius, dot / u_norm / radius
    # |θ - b0 u|² / R² - 1: of this 1 - a is made, so that nothing is lost where a is close to 1.
    beyond = (now - 1) * (now + 1) - share * (2 * along - share)
    norm = (1 + beyond).sqrt()
    step = share * (radius / u_norm) / norm
    shrink = torch.where(on_sphere, beyond / (norm * (norm + 1)) / step, rule.weight_decay)
    size = torch.where(on_sphere, step, rule.lr * scale)
    torch.addcmul(u, theta, shrink.to(dtype)[bucket.owner][:, None], out=u)

    ones = torch.ones_like(ratio)
    capped = (scale < 1) & ~on_sphere
    stats = torch.stack([0 * ones, ones, capped, torch.where(on_sphere, share, ratio)])
    return size.to(dtype), stats.sum(1, dtype=torch.float32)


def _dots(bucket: Bucket, a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every tensor, [tensors], from scratch [rows, BLOCK]: deterministic, in a fixed number of launches."""
    products, _ = bucket.work("moment")  # the direction is made: nothing needs it any more
    torch.mul(a, b, out=products)
    products[bucket.last_rows] = torch.where(bucket.present, products[bucket.last_rows], 0.0)
    blocks = products.sum(1)
    # A multi-tensor sum does not exist, but a 1-norm does: of what is positive, less of what is negative.
    parts = [
        torch.stack(torch._foreach_norm(list(x.split(bucket.counts)), 1)) for x in (blocks.relu(), (-blocks).relu())
    ]
    return parts[0] - parts[1]


class Plan:
    """The arenas of an optimizer and the buckets of one set of parameters with gradients."""

    def __init__(self) -> None:
        self.arenas: list[Arena] = []
        self._place: dict[int, tuple[Arena, int]] = {}

    def __len__(self) -> int:
        """Parameters that have a place in an arena."""
        return len(self._place)

    def buckets(self, groups: Sequence[tuple[dict[str, Any], Rule, list[Tensor]]], state: StateMap) -> list[Bucket]:
        """Buckets that cover the given parameters of each group, building arenas for those that have none yet."""
        workspaces: dict[tuple[torch.device, torch.dtype], Workspace] = {}
        result = []
        for group, rule, params in groups:
            for arena, members in self.place(params, rule, state):
                workspace = workspaces.setdefault((arena.device, arena.dtype), Workspace(arena.device, arena.dtype))
                result += [Bucket(arena, a, b, group, workspace) for a, b in _runs(arena, members)]
        return result

    def place(self, params: list[Tensor], rule: Rule, state: StateMap) -> list[tuple[Arena, list[int]]]:
        """Arenas of these parameters of one group, and their indices in each; built where there is none yet."""
        self._adopt([p for p in params if id(p) not in self._place], rule, state)
        found = self._by_arena(params)
        for arena, _ in found:
            arena.require(rule, state)
        return found

    def _adopt(self, params: list[Tensor], rule: Rule, state: StateMap) -> None:
        kinds: dict[Any, list[Tensor]] = {}
        for p in params:
            # One list off the multi-tensor path's layout would drag its whole bucket off it.
            kinds.setdefault((p.device, p.dtype, p.is_contiguous(), _is_large(p)), []).append(p)
        for members in kinds.values():
            arena = Arena(members, rule, state)
            self.arenas.append(arena)
            self._place |= {id(p): (arena, i) for i, p in enumerate(members)}

    def _by_arena(self, params: list[Tensor]) -> list[tuple[Arena, list[int]]]:
        found: dict[int, tuple[Arena, list[int]]] = {}
        for p in params:
            arena, i = self._place[id(p)]
            found.setdefault(id(arena), (arena, []))[1].append(i)
        return list(found.values())


def _is_large(p: Tensor) -> bool:
    return p.device.type == "cpu" and block_count(p.numel()) >= LARGE_BLOCKS


def _runs(arena: Arena, members: list[int]) -> list[tuple[int, int]]:
    """Half-open runs of consecutive tensors among `members` (ascending), each within the bucket's size."""
    limit = BUCKET_ELEMENTS.get(arena.device.type, _BUCKET_ELEMENTS_DEFAULT) // BLOCK
    runs: list[tuple[int, int]] = []
    for i in members:
        if runs and runs[-1][1] == i and arena.first[i + 1] - arena.first[runs[-1][0]] <= limit:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
