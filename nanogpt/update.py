"""An optimizer applied to a whole state: eagerly, or block by block with one graph for all blocks."""

from collections.abc import Callable

import torch
from torch import Tensor

from nanogpt import optim, sharding, tree
from nanogpt.graph import as_one_graph
from nanogpt.model import Params, block_names
from nanogpt.optim import OptState, Scaling, Transform, apply_updates
from nanogpt.tree import Tree

Update = Callable[[Params, OptState, Params], tuple[Params, OptState]]
"""`(grads, opt_state, params) -> (params, opt_state)`."""


def make_update(optimizer: Transform, *, donate: bool, compile: bool) -> Update:
    """The new parameters and state; with `donate` in the memory of the old ones.

    An optimizer that `optim.split` can take apart, as clipped AdamW, goes through the tree block by block, on
    each rank's own rows: with `compile` one graph reads a block's gradients, moments and parameters once,
    writes them once, and serves all layers. Any other optimizer runs eagerly on the tree as it is.
    """
    parts = optim.split(optimizer)
    if parts is not None:
        return make_update_by_block(*parts, donate=donate, compile=compile)

    def update(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = apply_updates(params, updates), new_opt_state
        # A count becomes a DTensor, or a leaf another layout, by arithmetic with what all ranks share.
        new = tree.map(sharding.laid_out_as, new, (params, opt_state))
        return tree.overwrite((params, opt_state), new) if donate else new

    return update


def make_update_by_block(
    scaling: Scaling | None, leafwise: Transform, *, donate: bool, compile: bool
) -> Update:
    """The body of `make_update` for an optimizer in two parts."""

    def update_part(factor: Tensor, numbers: Tree, grads: Params, opt_state: OptState, params: Params):
        updates = tree.map(lambda g: g * factor, grads)
        updates, new_opt_state = optim.update_leaves(leafwise, updates, opt_state, params, numbers)
        new = apply_updates(params, updates), new_opt_state
        return tree.overwrite_slots((params, opt_state), new, params) if donate else new

    update_block = update_outside = update_part
    if compile:
        update_block, update_outside = as_one_graph(update_part), as_one_graph(update_part)

    def update(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        device = next(iter(params.values())).device
        factor = torch.ones((), device=device) if scaling is None else sharding.whole(scaling.factor(grads))
        old = (params, opt_state if scaling is None else opt_state[1:])
        numbers = optim.numbers_of(leafwise, old[1])
        own_grads, (own_params, own_state) = sharding.local(grads), sharding.local(old)
        blocks, outside = block_names(params)
        parts = []
        for names in (*blocks, outside):
            part = [tree.pick(part_of, params, names) for part_of in (own_grads, own_state, own_params)]
            parts.append(
                (names, (update_outside if names is outside else update_block)(factor, numbers, *part))
            )
        new = tree.join(old, params, parts)
        if donate:  # slots are in their old place already; a count, which all parts have read, is not
            tree.overwrite((own_params, own_state), new)
            return params, opt_state
        new_params, new_state = tree.map(sharding.wrap, new, old)
        return new_params, new_state if scaling is None else (opt_state[0], *new_state)

    return torch.no_grad()(update)
