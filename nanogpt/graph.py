"""torch.compile as this project uses it: one graph a function, counted by itself."""

import types
from collections.abc import Callable
from typing import Any

import torch


def as_one_graph(function: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
    """`function` compiled at its first call, with a count of recompilations of its own.

    With `dynamic` the graph is one for all sizes of its arguments, of two elements and more.

    torch.compile keeps graphs by code object. Without a copy of it two steps made of one source would share
    them, and with the ninth model in a process the limit of recompilations would be reached.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=dynamic)
