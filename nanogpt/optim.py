"""Optimizers as pairs of pure functions, and learning rates as functions of the step.

The algebra is optax's: a `Transform` turns gradients into updates, transforms chain, and updates are added to
the parameters. Nothing here knows what it optimises; everything is tensor arithmetic, so it compiles with the
step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nanogpt import tree
from nanogpt.errors import UserError
from nanogpt.tree import Tree

OptState = Any
"""A tree of tensors that one transform owns."""

Schedule = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]
"""Step to learning rate; step 0 is the first update."""

Number = float | Float[Tensor, ""]
"""A setting: a tensor can also be mapped over by `vmap` and differentiated."""

Numbers = Callable[[OptState, Tree], Tree]
"""`(opt_state, params) -> numbers`: what an `Elementwise` computes before it visits the leaves."""

UpdateLeaves = Callable[[Tree, OptState, Tree, Tree], tuple[Tree, OptState]]
"""`(updates, opt_state, params, numbers) -> (updates, opt_state)`."""


class Transform(NamedTuple):
    """`init(params) -> opt_state` and `update(updates, opt_state, params) -> (updates, opt_state)`."""

    init: Callable[[Tree], OptState]
    update: Callable[[Tree, OptState, Tree], tuple[Tree, OptState]]


class Elementwise(Transform):
    """A Transform that treats every element alike, given some numbers that are computed beforehand.

    So it can be applied leaf by leaf, each in any shape, and one compiled graph serves all leaves. Whatever
    depends on a leaf's name or shape belongs in its numbers. They are kept out of the graph for another
    reason too: Inductor would recompute them for every element of every leaf.
    """

    numbers: Numbers
    """`(opt_state, params)` to 0-d tensors, or to trees with one for each parameter."""
    update_leaves: UpdateLeaves
    """`update` with the numbers as its last argument."""


class Scaling(Transform):
    """A stateless Transform that multiplies all updates by one number, `factor(their global norm)`.

    Only the norm needs the whole tree, and a caller that already has the norm need not compute it again.
    """

    factor: Callable[[Float[Tensor, ""]], Float[Tensor, ""]]


class Chain(Transform):
    """The result of `chain`, which remembers its `parts`."""

    parts: tuple[Transform, ...]


class AdamState(NamedTuple):
    """Number of updates so far; running means of the gradients and of their squares."""

    count: Int[Tensor, ""]
    mu: Tree
    nu: Tree


class ScheduleState(NamedTuple):
    """Number of updates so far."""

    count: Int[Tensor, ""]


class LossScaleState(NamedTuple):
    """The loss scale, the number of finite steps since it changed, and the inner state."""

    scale: Float[Tensor, ""]
    finite_steps: Int[Tensor, ""]
    inner: OptState


def chain(*transforms: Transform) -> Transform:
    """The transforms in sequence, each fed with the updates of the one before.

    `init` raises UserError for a `dynamic_loss_scale` among them, which the training step could not see.
    """

    def init(params: Tree) -> OptState:
        states = tuple(transform.init(params) for transform in transforms)
        if any(isinstance(state, LossScaleState) for state in states):
            raise UserError("dynamic_loss_scale is inside of a chain; wrap the whole chain in it instead")
        return states

    def update(updates: Tree, opt_state: OptState, params: Tree) -> tuple[Tree, OptState]:
        states = []
        for transform, state in zip(transforms, opt_state, strict=True):
            updates, state = transform.update(updates, state, params)
            states.append(state)
        return updates, tuple(states)

    chained = Chain(init, update)
    chained.parts = transforms
    return chained


def elementwise(
    init: Callable[[Tree], OptState],
    update_leaves: UpdateLeaves,
    *,
    numbers: Numbers = lambda opt_state, params: (),
) -> Elementwise:
    """An Elementwise of these functions."""

    def update(updates: Tree, opt_state: OptState, params: Tree) -> tuple[Tree, OptState]:
        return update_leaves(updates, opt_state, params, numbers(opt_state, params))

    transform = Elementwise(init, update)
    transform.numbers, transform.update_leaves = numbers, update_leaves
    return transform


def leafwise(transform: Transform) -> tuple[Numbers, UpdateLeaves]:
    """`numbers` and `update_leaves` of an elementwise transform, or of a chain of them.

    Returned as plain functions, since not every release of torch.compile can read a transform's attributes.
    """
    if not isinstance(transform, Chain):
        assert isinstance(transform, Elementwise)
        return transform.numbers, transform.update_leaves
    parts = [leafwise(part) for part in transform.parts]

    def numbers(opt_state: OptState, params: Tree) -> Tree:
        return tuple(
            its_numbers(state, params) for (its_numbers, _), state in zip(parts, opt_state, strict=True)
        )

    def update_leaves(
        updates: Tree, opt_state: OptState, params: Tree, numbers: Tree
    ) -> tuple[Tree, OptState]:
        states = []
        for (_, update), state, its_numbers in zip(parts, opt_state, numbers, strict=True):
            updates, state = update(updates, state, params, its_numbers)
            states.append(state)
        return updates, tuple(states)

    return numbers, update_leaves


def is_elementwise(transform: Transform) -> bool:
    """Whether `transform` may be applied leaf by leaf."""
    if isinstance(transform, Chain):
        return all(map(is_elementwise, transform.parts))
    return isinstance(transform, Elementwise)


def split(transform: Transform) -> tuple[Scaling | None, Transform] | None:
    """(scaling, elementwise) that in this order equal `transform`; None if it does not have that form.

    `chain(clip_by_global_norm(1.0), adamw(1e-3))` does. Its state is the scaling's, which is empty, followed
    by the elementwise chain's.
    """
    if is_elementwise(transform):
        return None, transform
    if isinstance(transform, Scaling):  # alone, its state is not a chain's
        return None
    first, *rest = transform.parts if isinstance(transform, Chain) else (transform,)
    return (first, chain(*rest)) if isinstance(first, Scaling) and all(map(is_elementwise, rest)) else None


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scales all updates together so that their global norm is at most `max_norm`.

    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks".
    """
    if not max_norm > 0:
        raise UserError(f"the clip norm is {max_norm}, expected above 0; set --optim.gradient-clip-norm")

    def factor(norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return torch.clamp(max_norm / norm, max=1.0)

    def update(updates: Tree, opt_state: OptState, params: Tree) -> tuple[Tree, OptState]:
        scale = factor(tree.global_norm(updates))
        return tree.map(lambda g: g * scale, updates), opt_state

    clip = Scaling(lambda params: (), update)
    clip.factor = factor
    return clip


def scale_by_adam(b1: float, b2: float, eps: float) -> Transform:
    """Updates divided by the root of their running second moment, both moments bias-corrected.

    Moments have the dtypes of the parameters. Source: Kingma and Ba 2015, algorithm 1.
    """

    def init(params: Tree) -> AdamState:
        zeros = tree.map(torch.zeros_like, params)
        return AdamState(_zero_like(params), zeros, tree.map(torch.zeros_like, params))

    def corrections(opt_state: AdamState, params: Tree) -> Tree:
        count = (opt_state.count + 1).float()
        return 1 - b1**count, 1 - b2**count

    def update(updates: Tree, opt_state: AdamState, params: Tree, numbers: Tree) -> tuple[Tree, AdamState]:
        mu_correction, nu_correction = numbers

        # Leaf by leaf, so that one leaf's temporaries are freed before the next leaf's are made.
        def update_leaf(g: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = g.to(mu.dtype)
            mu = torch.lerp(mu, g, 1 - b1)
            nu = torch.lerp(nu, g * g, 1 - b2)
            return (mu / mu_correction) / ((nu / nu_correction).sqrt() + eps), mu, nu

        updates, mu, nu = tree.map_many(update_leaf, updates, opt_state.mu, opt_state.nu)
        return updates, AdamState(opt_state.count + 1, mu, nu)

    return elementwise(init, update, numbers=corrections)


def add_decayed_weights(weight_decay: Number, mask: Tree | Callable[[Tree], Tree]) -> Transform:
    """Adds weight_decay * parameter to the updates where `mask`, or `mask(params)`, is True.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    def decays(opt_state: OptState, params: Tree) -> Tree:
        device = tree.leaves(params)[0].device
        some, none = (as_scalar(decay, device) for decay in (weight_decay, 0.0))
        decayed_leaves = mask(params) if callable(mask) else mask
        return tree.map(lambda decayed: some if decayed else none, decayed_leaves)

    def update(updates: Tree, opt_state: OptState, params: Tree, numbers: Tree) -> tuple[Tree, OptState]:
        return tree.map(lambda u, p, decay: u + decay * p, updates, params, numbers), opt_state

    return elementwise(lambda params: (), update, numbers=decays)


def scale_by_learning_rate(learning_rate: Number | Schedule) -> Transform:
    """Updates times minus the learning rate, so that adding them to the parameters goes downhill."""

    def init(params: Tree) -> ScheduleState:
        return ScheduleState(_zero_like(params))

    def rate(opt_state: ScheduleState, params: Tree) -> Tree:
        value = learning_rate(opt_state.count) if callable(learning_rate) else learning_rate
        return as_scalar(value, opt_state.count.device)

    def update(
        updates: Tree, opt_state: ScheduleState, params: Tree, numbers: Tree
    ) -> tuple[Tree, ScheduleState]:
        return tree.map(lambda u: -numbers * u, updates), ScheduleState(opt_state.count + 1)

    return elementwise(init, update, numbers=rate)


def as_scalar(value: Number, device: torch.device) -> Float[Tensor, ""]:
    """The value on `device`, a tensor as it is; a number is written there without waiting for a GPU."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.float32, device=device)


def matrices(params: Tree) -> Tree:
    """True for leaves of two or more dimensions: those are decayed, biases and gains are not."""
    return tree.map(lambda p: p.ndim >= 2, params)


def adamw(
    learning_rate: Number | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 0.01,
    decay_mask: Tree | Callable[[Tree], Tree] = matrices,
) -> Transform:
    """Adam, with decoupled weight decay where `decay_mask`, or as a function `decay_mask(params)`, is True.

    Source: Loshchilov and Hutter 2019. Raises UserError for a beta outside [0, 1).
    """
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise UserError(f"{name} is {beta}, expected at least 0 and below 1; set --optim.betas")
    return chain(
        scale_by_adam(b1, b2, eps),
        add_decayed_weights(weight_decay, decay_mask),
        scale_by_learning_rate(learning_rate),
    )


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, leaf by leaf, in the dtype of the parameter."""
    return tree.map(lambda p, u: (p + u).to(p.dtype), params, updates)


def warmup_cosine(peak: float, *, final: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Learning rate by step: linear to `peak`, then half a cosine down to `final`, where it stays.

    Step 0 already has peak / warmup_steps, so no update is empty; step warmup_steps - 1 has the peak.
    Source: Brown et al. 2020, appendix B. Raises UserError unless 0 < warmup_steps < total_steps.
    """
    if not 0 < warmup_steps < total_steps:
        raise UserError(
            f"warmup takes {warmup_steps} of {total_steps} steps, expected at least 1 and fewer than all; "
            f"set --optim.warmup-steps below --train.max-steps"
        )

    def schedule(step: Int[Tensor, ""]) -> Float[Tensor, ""]:
        step = torch.as_tensor(step).float()
        progress = ((step - warmup_steps) / (total_steps - warmup_steps)).clamp(0, 1)
        cosine = final + (peak - final) * 0.5 * (1 + torch.cos(math.pi * progress))
        return torch.where(step < warmup_steps, peak * (step + 1) / warmup_steps, cosine)

    return schedule


def dynamic_loss_scale(
    inner: Transform, *, initial: float = 2.0**15, growth_interval: int = 2000, largest: float = 2.0**24
) -> Transform:
    """`inner` for gradients of `scale` times the loss; a step whose gradients overflow changes nothing.

    An overflow halves the scale; `growth_interval` finite steps in a row double it.
    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.2.
    """

    def init(params: Tree) -> LossScaleState:
        scale = torch.full_like(_zero_like(params), initial, dtype=torch.float32)
        return LossScaleState(scale, _zero_like(params), inner.init(params))

    def update(updates: Tree, opt_state: LossScaleState, params: Tree) -> tuple[Tree, LossScaleState]:
        scale, finite_steps, inner_state = opt_state
        updates = tree.map(lambda g: g / scale, updates)
        finite = all_finite(updates)
        updates, stepped = inner.update(updates, inner_state, params)
        updates = tree.map(lambda u: torch.where(finite, u, torch.zeros_like(u)), updates)
        inner_state = tree.map(lambda new, old: torch.where(finite, new, old), stepped, inner_state)
        grow = finite & (finite_steps + 1 >= growth_interval)
        grown = torch.where(grow, (scale * 2).clamp(max=largest), scale)
        return updates, LossScaleState(
            torch.where(finite, grown, (scale / 2).clamp(min=1.0)),
            torch.where(finite & ~grow, finite_steps + 1, torch.zeros_like(finite_steps)),
            inner_state,
        )

    return Transform(init, update)


def all_finite(updates: Tree) -> Bool[Tensor, ""]:
    """True if no element of any leaf is infinite or NaN."""
    return torch.stack([leaf.isfinite().all() for leaf in tree.leaves(updates)]).all()


def _zero_like(params: Tree) -> Int[Tensor, ""]:
    """A step count of 0 on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
