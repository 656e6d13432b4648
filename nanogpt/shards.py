"""DTensors and the parts of them that this rank holds.

torch splits a dim into parts of ceil(size / ranks): all equal, except for a short one and then empty ones at
the end. Arrays on disk are split into chunks in the same way, so each shard is one chunk and none is padded.

Importing `torch.distributed.tensor` takes about as long as importing torch, so `checkpoint` does it only
under torch.distributed.
"""

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanogpt.arrays import Part, to_tensor


def part_of(leaf: Tensor, *, rank: int) -> Part:
    """The part of `leaf` that this process, `rank`, holds: its shard of a DTensor, all of a plain tensor.

    Plain tensors are equal on all ranks. Raises ValueError for a DTensor that is neither replicated nor
    sharded along some axis of its mesh, or that has a dim sharded along two.
    """
    shape = tuple(leaf.shape)
    if not isinstance(leaf, DTensor):
        return Part(shape, shape, tuple(slice(0, size) for size in shape), rank == 0)
    coordinate = leaf.device_mesh.get_coordinate()
    assert coordinate is not None, "a leaf lives on a mesh that this rank is not part of"
    chunk, index, is_first = list(shape), [slice(0, size) for size in shape], True
    for axis, placement in enumerate(leaf.placements):
        if isinstance(placement, Shard) and chunk[placement.dim] == shape[placement.dim]:
            dim = placement.dim
            chunk[dim] = -(-shape[dim] // leaf.device_mesh.size(axis))
            start = min(chunk[dim] * coordinate[axis], shape[dim])
            index[dim] = slice(start, min(start + chunk[dim], shape[dim]))
        elif isinstance(placement, Replicate):
            is_first = is_first and coordinate[axis] == 0
        else:
            raise ValueError(f"a leaf placed as {leaf.placements} cannot be saved or restored in shards")
    held, computed = tuple(leaf.to_local().shape), tuple(dim.stop - dim.start for dim in index)
    assert held == computed, f"a shard of {held} elements lies where {computed} were expected"
    return Part(shape, tuple(chunk), tuple(index), is_first)


def local(leaf: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def placed_like(leaf: Tensor, array: np.ndarray) -> Tensor:
    """`array`, this rank's part, as a tensor with the placement and device of `leaf`; no communication."""
    part = to_tensor(array, local(leaf).device)
    if not isinstance(leaf, DTensor):
        return part
    stride = torch.empty(leaf.shape, device="meta").stride()
    return DTensor.from_local(
        part, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=stride
    )
