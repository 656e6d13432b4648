"""Functions over pytrees of tensors: dicts, lists, tuples and NamedTuples, nested to any depth.

This is the one place that touches torch's private pytree and functorch modules.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
)
from torch.utils import _pytree as pytree

Tree = Any
"""A tensor, or a dict, list, tuple or NamedTuple of trees."""


def map(
    function: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> Tree:
    """A tree of `function(leaf, *leaves of rest at the same place)`; all trees share one structure.

    A node for which `is_leaf` holds is passed whole, together with the other trees' nodes at its place.
    """
    return pytree.tree_map(function, tree, *rest, is_leaf=is_leaf)


def map_many(function: Callable[..., tuple[Any, ...]], tree: Tree, *rest: Tree) -> tuple[Tree, ...]:
    """Like `map`, for a function that returns several values: one tree for each of them."""
    structure = pytree.tree_structure(tree)
    columns = [leaves(tree), *(structure.flatten_up_to(other) for other in rest)]  # dicts may differ in order
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return tuple(unflatten(tree, list(column)) for column in zip(*rows, strict=True))


def is_slot_of(params: dict[str, Any]) -> Callable[[Any], bool]:
    """A predicate for slots: nodes with one value per parameter (gradients, a moment), unlike a count."""
    return lambda node: isinstance(node, dict) and node.keys() == params.keys()


def split(tree: Tree, params: dict[str, Any]) -> dict[str, Tree]:
    """One tree per parameter, as if it were the only one and called "leaf"; each has all other nodes."""
    is_slot = is_slot_of(params)

    def cut(node: Any) -> dict[str, Any]:
        if is_slot(node):
            return {name: {"leaf": node[name]} for name in params}
        if not isinstance(node, (dict, list, tuple)):  # Dynamo does not take a union of types here
            return dict.fromkeys(params, node)
        keys, values = (list(node), list(node.values())) if isinstance(node, dict) else (None, list(node))
        rows = zip(*(cut(value).values() for value in values), strict=True) if values else [()] * len(params)
        return {name: put_together(node, keys, row) for name, row in zip(params, rows, strict=True)}

    return cut(tree)


def put_together(like: Any, keys: list[Any] | None, values: tuple[Any, ...]) -> Any:
    """A node of the type of `like`; pytree's own way takes ten times as long, and `split` needs many."""
    if keys is not None:
        return dict(zip(keys, values, strict=True))
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def join(tree: Tree, params: dict[str, Any], parts: dict[str, Tree], rest: Tree) -> Tree:
    """The inverse of `split`: the structure of `tree` with the slots of `parts`, one for each parameter.

    Nodes that are no slots are taken from `rest`, a tree like one of the parts.
    """
    is_slot = is_slot_of(params)

    def gather(node: Any, *cuts: Any) -> Any:
        values = dict(zip(parts, cuts[:-1], strict=True))
        return {name: values[name]["leaf"] for name in node} if is_slot(node) else cuts[-1]

    return map(gather, tree, *parts.values(), rest, is_leaf=is_slot)


def apart(tree: Tree, other: Tree) -> Tree:
    """`tree` with a copy of each leaf that shares memory with one of `other`, or with an earlier one."""
    taken = {_memory_of(leaf) for leaf in leaves(other)}

    def own(leaf: Any) -> Any:
        memory = _memory_of(leaf)
        if memory is not None and memory in taken:
            return leaf.clone()
        taken.add(memory)
        return leaf

    return map(own, tree)


def hands_on(old: Tree, new: Tree) -> bool:
    """Whether a leaf of `new` is a leaf of `old` from another place or, which a graph cannot tell, a view."""
    pairs = itertools.product(enumerate(leaves(old)), enumerate(leaves(new)))
    moved = ((one, other) for (i, one), (j, other) in pairs if i != j)
    if torch.compiler.is_compiling():
        return any(one is other for one, other in moved)
    return any(_memory_of(one) == _memory_of(other) for one, other in moved)


def overwrite(old: Tree, new: Tree) -> Tree:
    """`old`, its memory overwritten with the values of `new`; no two of these may share memory."""

    def move(kept: Tensor, value: Tensor) -> Tensor:
        if kept is not value:
            kept.copy_(value)
        return kept

    return map(move, old, new)


def overwrite_slots(old: Tree, new: Tree, params: dict[str, Any]) -> Tree:
    """`overwrite` for the slots; nodes that are no slots are those of `new`."""
    is_slot = is_slot_of(params)
    return map(
        lambda kept, value: overwrite(kept, value) if is_slot(kept) else value, old, new, is_leaf=is_slot
    )


def only_slots(tree: Tree, params: dict[str, Any]) -> Tree:
    """The tree with None for every node that is no slot."""
    is_slot = is_slot_of(params)
    return map(lambda node: node if is_slot(node) else None, tree, is_leaf=is_slot)


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in the order in which `paths` names them."""
    return pytree.tree_leaves(tree)


def paths(tree: Tree) -> dict[str, Any]:
    """Each leaf under its path: keys, field names and positions joined by "/" (`params/wte.weight`)."""
    return {
        "/".join(_key_name(key) for key in path): leaf for path, leaf in pytree.tree_leaves_with_path(tree)
    }


def unflatten(like: Tree, leaves: list[Any]) -> Tree:
    """A tree with the structure of `like` and these `leaves`, in the order of `paths(like)`."""
    return pytree.tree_unflatten(leaves, pytree.tree_structure(like))


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """The Euclidean norm of all leaves together, as if they were one vector; accumulated in fp32."""
    parts = [leaf.float() for leaf in leaves(tree)]
    if not torch.compiler.is_compiling() and any(map(is_functorch_wrapped_tensor, parts)):
        norms = [torch.linalg.vector_norm(part) for part in parts]  # vmap and jvp fail in one call for all
    else:
        norms = torch.ops.aten._foreach_norm.Scalar(parts)
    return torch.linalg.vector_norm(torch.stack(norms))


def in_a_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, ...) is under way, in this thread."""
    return maybe_current_level() is not None


def is_mapped(leaf: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over a dimension of `leaf`, which its shape then does not show."""
    while is_functorch_wrapped_tensor(leaf):
        if is_batchedtensor(leaf):
            return True
        leaf = get_unwrapped(leaf)  # `grad` wraps as well
    return False


def diff(got: Tree, expected: Tree) -> list[str]:
    """One sentence for each leaf whose name, shape or dtype differs; empty if the trees agree.

    Leaves are anything with `.shape` and `.dtype`: tensors, arrays or descriptions of them.
    """
    have, want = paths(got), paths(expected)
    missing = [f"{name} is missing" for name in want if name not in have]
    extra = [f"{name} is not expected" for name in have if name not in want]
    wrong = [
        f"{name} is {_describe(have[name])}, expected {_describe(leaf)}"
        for name, leaf in want.items()
        if name in have and _describe(have[name]) != _describe(leaf)
    ]
    return missing + extra + wrong


def _memory_of(leaf: Any) -> int | None:
    """Which memory the leaf's values are in; a view has that of its base, and what is no tensor has none."""
    if not isinstance(leaf, Tensor):
        return None
    while is_functorch_wrapped_tensor(leaf):
        leaf = get_unwrapped(leaf)
    return leaf.untyped_storage()._cdata


def _describe(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"


def _key_name(key: Any) -> str:
    if isinstance(key, pytree.MappingKey):
        return str(key.key)
    if isinstance(key, pytree.GetAttrKey):
        return key.name
    return str(key.idx)
