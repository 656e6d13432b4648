"""An optimizer applied to a whole state: eagerly, or leaf by leaf with one graph for all leaves."""

from collections.abc import Callable

import torch
from torch import Tensor

from nanogpt import optim, sharding, tree
from nanogpt.errors import UserError
from nanogpt.graph import as_one_graph
from nanogpt.model import Params
from nanogpt.optim import OptState, Scaling, Transform, UpdateLeaves, apply_updates
from nanogpt.tree import Tree

Update = Callable[[Params, Tensor, OptState, Params], tuple[Params, OptState]]
"""`(grads, global norm of grads, opt_state, params) -> (params, opt_state)`."""


def make_update(optimizer: Transform, *, donate: bool, compile: bool) -> Update:
    """A function that returns the new parameters and state; with `donate`, in the memory of the old ones.

    An optimizer that `optim.split` can take apart, such as clipped AdamW, goes through the tree leaf by leaf,
    on each rank's own rows. With `compile` one graph serves all leaves; it reads a leaf's gradient, moments
    and values once and writes them once. Any other optimizer runs eagerly on the whole tree.
    """
    parts = optim.split(optimizer)
    if parts is not None:
        return make_update_by_leaf(*parts, donate=donate, compile=compile)

    def update(grads: Params, norm: Tensor, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = apply_updates(params, updates), new_opt_state
        # Arithmetic between DTensors and plain tensors can make a count a DTensor, or change a leaf's layout.
        new = tree.map(sharding.laid_out_as, new, (params, opt_state))
        if not donate:
            return new
        own, own_new = sharding.local((params, opt_state)), sharding.local(new)
        if not torch.compiler.is_compiling():  # an old leaf that moved to another place is copied first
            own_new = tree.apart(own_new, own)
        tree.overwrite(own, own_new)
        return params, opt_state

    return update


def make_update_by_leaf(
    scaling: Scaling | None, elementwise: Transform, *, donate: bool, compile: bool
) -> Update:
    """The body of `make_update` for an optimizer in two parts."""
    numbers_of, update_leaves = optim.leafwise(elementwise)
    factor_of = torch.ones_like if scaling is None else scaling.factor
    update_leaf = make_update_of_a_leaf(update_leaves, donate=donate)

    def update_slots(factor: Tensor, numbers: Tree, grads: Params, opt_state: OptState, params: Params):
        return tree.only_slots(update_leaf(factor, numbers, grads, opt_state, params), params)

    # dynamic=False: only the mark below says which size may vary, not what earlier leaves looked like.
    compiled = as_one_graph(update_slots, dynamic=False) if compile else update_slots

    def row_of(leaf: Tensor) -> Tensor:
        row = in_a_row(leaf)
        if compile:
            torch._dynamo.maybe_mark_dynamic(row, 0)  # one graph for any number of elements
        return row

    def update(grads: Params, norm: Tensor, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        factor = factor_of(norm)
        old = (params, opt_state if scaling is None else opt_state[1:])
        numbers = numbers_of(old[1], params)
        own_old = sharding.local(old)
        flat = tree.map(row_of, own_old)
        flat_grads = tree.map(lambda leaf: row_of(leaf.contiguous()), sharding.local(grads))
        parts = tree.split((numbers, flat_grads, flat[1], flat[0]), params)
        # What is shared by all leaves, such as a count, is updated once, on one spare element of a leaf.
        beside = tree.map(lambda part: part[:1].clone() if part.ndim else part, next(iter(parts.values())))
        rest = update_leaf(factor, *beside)  # first, since it may refuse the transform
        for name, part in parts.items():
            # A rank may have no rows of a leaf, and a graph of dynamic size needs at least two elements.
            update_one = compiled if flat[0][name].numel() > 1 else update_slots
            parts[name] = update_one(factor, *part)
        new = tree.join(flat, params, parts, rest)
        if donate:  # slots were overwritten leaf by leaf; a count only now, since every leaf has read it
            tree.overwrite(flat, new)
            return params, opt_state
        new = tree.map(lambda value, like: value.view(like.shape), new, own_old)
        new_params, new_state = tree.map(sharding.wrap, new, old)
        return new_params, new_state if scaling is None else (opt_state[0], *new_state)

    # An eager update that makes new leaves can be differentiated, by a learning rate for instance.
    return torch.no_grad()(update) if donate or compile else update


def make_update_of_a_leaf(update_leaves: UpdateLeaves, *, donate: bool) -> Callable[..., Tree]:
    """`(factor, numbers, grads, opt_state, params) -> (params, opt_state)` for trees of one leaf.

    With `donate` the leaf and its slots are overwritten; what it shares with other leaves is not.
    """

    def update_leaf(factor: Tensor, numbers: Tree, grads: Params, opt_state: OptState, params: Params):
        updates = tree.map(lambda g: g * factor, grads)
        updates, new_opt_state = update_leaves(updates, opt_state, params, numbers)
        new = apply_updates(params, updates), new_opt_state
        if donate and tree.hands_on((params, opt_state), new):  # Inductor 2.13 drops the copies this needs
            raise UserError(
                "an elementwise transform hands a leaf on to another place, which a donated step cannot; "
                "make it a Transform, or the step with donate=False"
            )
        return tree.overwrite_slots((params, opt_state), new, params) if donate else new

    return update_leaf


def in_a_row(leaf: Tensor) -> Tensor:
    """The leaf's elements in one dimension, in the same memory. Raises UserError if it is not contiguous."""
    if not leaf.is_contiguous():
        raise UserError(
            f"a leaf of shape {list(leaf.shape)} has the strides {list(leaf.stride())}, expected a "
            f"contiguous one; call .contiguous() on the parameters that a state starts with"
        )
    return leaf.view(-1)
