"""Tensors as numpy arrays in host memory, and parts of them."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
"""The leaves of a tree in host memory, by their paths."""

Index = tuple[slice, ...]
"""A box within an array: one slice for each dim, or none at all for the whole."""


class Part(NamedTuple):
    """The part that a rank holds of a tensor that is split into shards."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    chunk: tuple[int, ...]
    """Of a shard that is neither short nor empty."""
    index: Index
    """Where this rank's shard lies."""
    is_first: bool
    """Whether no rank before this one holds the same elements."""

    @property
    def is_empty(self) -> bool:
        return any(dim.start == dim.stop for dim in self.index)


def to_array(tensor: Tensor) -> np.ndarray:
    """A copy in host memory that shares nothing with `tensor`."""
    host = tensor.detach().to("cpu", copy=True).contiguous()
    if host.dtype == torch.bfloat16:  # which numpy lacks: the same bits under a dtype that Orbax knows
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """The same bits on `device`; on the CPU it shares the memory of `array`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)
