"""C3O in host memory, tensor by tensor: a processor has a cache, and a tensor of some megabytes stays in it.

`c3o_foreach` walks a bucket once for each of its operations, some 30 accesses a number and step on a sphere, all of
them to memory once a bucket is larger than the cache. Here one tensor is finished before the next is begun:

    g <- g · clip, where the clip binds;  fused Adam (m, v, u);  with Nesterov m <- lerp(m, g);  three dot products;
    fused SGD (θ - size (u + shrink θ))

of which memory sees, for a tensor that fits in the cache, θ, m, v read and written and g read: 28 bytes a number in
float32, 32 where the clip binds (and 4 before it, for the norm of all gradients). What a step decides it decides with
numbers of the host.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from eco_llm.optim.c3o_foreach import Bucket, adam_serves, adam_settings
from eco_llm.optim.grads import dot_product
from eco_llm.optim.rule import Rule


def host_serves(bucket: Bucket, rule: Rule) -> bool:
    """Whether `host_step` can take a bucket's step and pays; its group has not asked for multi-tensor calls.

    It follows from the settings and from each tensor alone, whatever its neighbours are: those may differ after a
    resume, which must take the same path.
    """
    return (
        bucket.arena.large
        and adam_serves(bucket, [], rule)
        and bucket.group["foreach"] is None
        and not rule.has_credit
        and not rule.may_skip_norms
        and not (isinstance(rule.lr, Tensor) and rule.lr.device.type != "cpu")
        and all(p.is_contiguous() for p in bucket.params)
    )


def host_step(bucket: Bucket, grads: list[Tensor], rule: Rule, clip: Tensor | None) -> Tensor:
    """One C3O step of a bucket, in place on its parameters and state.

    Args:
        grads: one a parameter, unscaled, of any strides and type; those that lie row by row are clipped in place.
        rule: the bucket's group, now.
        clip: 0-dim, what gradients are multiplied by; None: they are clipped already.

    Returns:
        As `foreach_step`: float32 [4].
    """
    if clip == 1:
        clip = None
    t = bucket.step + 1
    scratch = bucket.workspace.rows("update", bucket.rows).view(-1)
    stats = [0.0, 0.0, 0.0, 0.0]
    streams = zip(bucket.params, grads, bucket.exp_avg_views, bucket.exp_avg_sq_views, t.unbind(), strict=True)
    settings = functools.cache(lambda age: adam_settings(age, rule))  # most tensors are of one age
    for i, (p, g, m, v, age) in enumerate(streams):
        u = scratch[: p.numel()].view(p.shape).zero_()  # the same memory for every tensor: it stays in the cache
        g = g.to(u.dtype).contiguous()
        if clip is not None:
            g.mul_(clip)
        beta1, rate = settings(float(age))
        torch._fused_adam_(
            [u], [g], [m], [v], [], [age], lr=-rate, beta1=beta1, beta2=rule.beta2, weight_decay=0.0, eps=rule.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        if rule.nesterov:  # Adam left a mean on the line from g through the new m (`adam_settings`)
            m.lerp_(g, 1 - rule.beta1 / beta1)
        radius = None if bucket.sphere_radius is None else bucket.sphere_radius[i]
        size, shrink = _size_and_shrink(p, u, radius, rule, stats)
        torch._fused_sgd_(
            [p], [u], [], weight_decay=shrink, momentum=0.0, lr=size, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=True,
        )  # fmt: skip
    bucket.step.copy_(t)
    torch.autograd.graph.increment_version(bucket.params)  # PyTorch's fused calls do not say that they write
    return torch.tensor(stats, dtype=torch.float32, device=bucket.arena.device)


def _size_and_shrink(
    theta: Tensor, u: Tensor, radius: Tensor | None, rule: Rule, stats: list[float]
) -> tuple[float, float]:
    """(size, shrink) with θ' = θ - size (u + shrink θ); adds to the step's statistics and sets an unknown radius.

    On the sphere θ' = R (θ - b0 u) / |θ - b0 u|, b0 = ρ R / |u|, made as in `c3o_foreach._onto_sphere`.
    """
    lr, decay = float(rule.lr), rule.weight_decay
    if not rule.measures:
        return lr, decay
    square, u_square, dot = (dot_product(a, b) for a, b in ((theta, theta), (u, u), (theta, u)))
    norm, u_norm = math.sqrt(square), math.sqrt(u_square)
    stats[1] += 1
    if radius is not None:
        if radius < 0:
            radius.fill_(norm)
        kept, share = float(radius), rule.sphere * lr
        if kept > 0 and u_norm > 0 and share > 0:
            now, along = norm / kept, dot / u_norm / kept
            # |θ - b0 u|² / R² - 1, of which nothing is lost where it is close to 0
            beyond = (now - 1) * (now + 1) - share * (2 * along - share)
            length = math.sqrt(1 + beyond) if -1 < beyond < math.inf else 0.0  # not so if anything is NaN or infinite
            size = share * (kept / u_norm) / length if length else 0.0
            if size:
                stats[3] += share
                return size, beyond / (length * (length + 1)) / size
    d_norm = math.sqrt(max(u_square + decay * (2 * dot + decay * square), 0.0))  # in this order NaN stays
    scale, weight = 1.0, max(norm, rule.trust_floor * math.sqrt(theta.numel()))
    if rule.has_trust and lr * d_norm > rule.trust_radius * weight:
        scale = rule.trust_radius * weight / (lr * d_norm)
        stats[2] += 1
    if weight > 0:
        stats[3] += lr * d_norm * scale / weight
    return lr * scale, decay
