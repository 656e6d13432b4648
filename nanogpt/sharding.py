"""Parameters as a pytree of DTensors: the mesh, placing leaves on it, and FSDP2 bound to a pytree.

FSDP2 computes with its own modules' parameters and silently ignores any others that a functional call passes
in. So the pytree is bound: its DTensors become the modules' parameters (same storage, no copy), functions are
called with what FSDP2 gathers, and the gradients are collected into a pytree again.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from nanogpt import tree
from nanogpt.errors import UserError
from nanogpt.tree import Tree

Result = TypeVar("Result")


def mesh_shape(*, shard: int | None, replicate: int | None, size: int, local_size: int) -> tuple[int, int]:
    """(replicate, shard): how `size` processes, `local_size` on each machine, are laid out.

    If one is None it follows from the other; if both are, machines shard inside and replicate across. Raises
    UserError unless replicate x shard is `size`.
    """
    given = {"--mesh.replicate": replicate, "--mesh.shard": shard}
    if shard is None:
        shard = size // replicate if replicate else local_size
    if replicate is None:
        replicate = size // max(shard, 1)
    if min(shard, replicate) < 1 or shard * replicate != size:
        said = " and ".join(f"{flag} {value}" for flag, value in given.items() if value is not None)
        raise UserError(
            f"{said or f'{local_size} processes on a machine'} cannot make a mesh of {size} processes; set "
            f"--mesh.shard and --mesh.replicate to numbers whose product is {size}"
        )
    return replicate, shard


def make_mesh(device_type: str, shape: tuple[int, int]) -> DeviceMesh:
    """The mesh with axes "replicate" and "shard"; neighbouring ranks shard one replica.

    Without replicas it has only the second axis, which saves FSDP2 an all-reduce over groups of one.
    """
    if shape[0] == 1:
        return init_device_mesh(device_type, shape[1:], mesh_dim_names=("shard",))
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def place(leaf: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of `leaf`, which every rank holds: no communication, and the whole leaf can go."""
    sharded = distribute_tensor(leaf, mesh, placements_on(mesh), src_data_rank=None)
    own = sharded.to_local()
    return wrap(own.clone() if own.untyped_storage().nbytes() > own.nbytes else own, sharded)


def placements_on(mesh: DeviceMesh) -> tuple[Placement, ...]:
    """How `place` lays a leaf out: rows divided along the last axis, whole along one before it."""
    return (*[Replicate()] * (mesh.ndim - 1), Shard(0))


def local(tree_of: Tree) -> Tree:
    """The tree with this rank's part of each DTensor, in the same memory; other leaves unchanged."""
    return tree.map(lambda leaf: leaf.to_local() if isinstance(leaf, DTensor) else leaf, tree_of)


def wrap(own: Tensor, like: Tensor) -> Tensor:
    """`own` as this rank's part of a DTensor laid out like `like`; `own` itself if `like` is no DTensor."""
    if not isinstance(like, DTensor):
        return own
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def laid_out_as(leaf: Tensor, like: Tensor) -> Tensor:
    """`leaf` laid out like `like`, whole if that is no DTensor; a collective if the layout changes."""
    if not isinstance(leaf, DTensor):
        return leaf
    if not isinstance(like, DTensor):
        return leaf.full_tensor()
    return leaf.redistribute(placements=like.placements)


def added_up(leaf: Tensor) -> Tensor:
    """`leaf` with the sum on every rank where each has only a part of it, as of a norm over sharded rows.

    That layout can neither be saved nor given to another leaf. A collective if the leaf has it.
    """
    if not isinstance(leaf, DTensor):
        return leaf
    placements = [Replicate() if axis.is_partial() else axis for axis in leaf.placements]
    return leaf.redistribute(placements=placements)


def whole(leaf: Tensor) -> Tensor:
    """All of `leaf` on every rank, partial sums added up; a collective if it is a DTensor."""
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def whole_on_first_rank(params: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """All leaves on rank 0, gathered one at a time, and None on the other ranks; a collective."""
    kept = {}
    for name, leaf in params.items():
        gathered = whole(leaf)
        if dist.get_rank() == 0:
            kept[name] = gathered
    return kept or None


def mean_over_ranks(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """The mean of the `value` of every rank of the mesh, whose collective it is."""
    return sum_over_ranks(value, mesh) / mesh.size()


def sum_over_ranks(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the `value` of every rank of the mesh, whose collective it is."""
    value = value.clone()
    for axis in mesh.get_all_groups():
        dist.all_reduce(value, group=axis)
    return value


def sums_over_ranks(*values: int) -> list[int]:
    """Each value's sum over all ranks, modulo 2^63; a collective on the CPU, for numbers on the host."""
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums)
    return [int(value) % 2**63 for value in sums]


class Held(nn.Module):
    """Some leaves of a pytree as a module that FSDP2 can shard.

    `held(function, *arguments)` is `function(leaves, *arguments)`. Inside, names have slashes instead of
    dots, which a module's parameter may not contain.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(leaf))

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        leaves = {name.replace("/", "."): leaf for name, leaf in self.named_parameters(recurse=False)}
        return function(leaves, *arguments)


class Bound:
    """FSDP2's modules for a pytree of DTensors: `bind` it, `call` functions with it, `collect` gradients."""

    def __init__(
        self,
        shapes: Mapping[str, Tensor],
        blocks: list[dict[str, str]],
        outside: dict[str, str],
        mesh: DeviceMesh,
        *,
        dtype: torch.dtype,
        reshard_after_forward: bool = False,
    ) -> None:
        """`shapes` are leaves on the meta device; `blocks` and `outside` are their `model.block_names`.

        A block is gathered when it is called, in `dtype`; everything else is gathered at the start, in fp32.
        All gradients are reduced in fp32.
        """
        fp32 = torch.float32
        outer = Held({new: shapes[old] for new, old in outside.items()})
        held = [Held({new: shapes[old] for new, old in names.items()}) for names in blocks]
        outer.blocks = nn.ModuleList(held)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=fp32, cast_forward_inputs=False)
        for block in held:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        policy = MixedPrecisionPolicy(param_dtype=fp32, reduce_dtype=fp32, cast_forward_inputs=False)
        fully_shard(outer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._outer, self._blocks = outer, held
        self._layout = mesh, placements_on(mesh)
        self._keys = {old: new.replace(".", "/") for new, old in outside.items()}
        for layer, names in enumerate(blocks):
            self._keys |= {old: f"blocks.{layer}.{new.replace('.', '/')}" for new, old in names.items()}

    def bind(self, params: Mapping[str, Tensor]) -> None:
        """Makes the next calls compute with `params`; UserError unless `place` has put each on the mesh."""
        for name in self._keys:
            leaf = params.get(name)
            if not isinstance(leaf, DTensor) or (leaf.device_mesh, leaf.placements) != self._layout:
                raise UserError(
                    f"{name} is {'missing' if leaf is None else 'not laid out on the mesh of this step'}, "
                    "expected a DTensor with this rank's rows; make the state with init_state(mesh=...), or "
                    "its leaves with sharding.place(leaf, mesh)"
                )
        self._outer.load_state_dict({self._keys[name]: leaf for name, leaf in params.items()}, assign=True)

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(whole leaves outside of the blocks, *arguments)`; inside, `call_block` may be used."""
        return self._outer(function, *arguments)

    def call_block(self, layer: int, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(whole leaves of the block, *arguments)`."""
        return self._blocks[layer](function, *arguments)

    def reduce_gradients(self, is_last: bool) -> None:
        """Sets whether the next backward pass reduces gradients over ranks, earlier passes' included."""
        assert isinstance(self._outer, FSDPModule)
        self._outer.set_requires_gradient_sync(is_last)
        self._outer.set_is_last_backward(is_last)

    def release(self) -> None:
        """Frees what was gathered for calls without a backward pass, which would have freed it."""
        for module in (self._outer, *self._blocks):
            assert isinstance(module, FSDPModule)
            module.reshard()

    def collect(self) -> dict[str, Tensor]:
        """The gradients since the last call, averaged over ranks, as DTensors under the pytree's names."""
        own = dict(self._outer.named_parameters())
        grads = {}
        for name, key in self._keys.items():
            grad = own[key].grad
            assert grad is not None, f"{name} took no part in the loss"
            grads[name], own[key].grad = grad, None
        return grads
