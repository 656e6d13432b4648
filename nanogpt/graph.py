"""torch.compile as this project uses it: one graph a function, counted by itself."""

import functools
import importlib
import logging
import os
import signal
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def as_one_graph(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """`function` compiled at its first call, with a count of recompilations of its own.

    `dynamic` is torch.compile's: False takes every size as it is, except those that are marked.

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

    @functools.cache
    def compiled() -> Callable[..., Any]:
        start_compiler()
        return torch.compile(own, fullgraph=True, dynamic=dynamic)

    return lambda *arguments: compiled()(*arguments)


@functools.cache
def start_compiler() -> None:
    """Imports the compiler, and begins its look at the C++ compiler, to go on beside what the caller does.

    With an empty cache that takes some seconds. The imports are over before: two threads that import the
    same modules find them half made. From here on all graphs of a process without a GPU compute norms and
    GELUs again where their gradient is taken, instead of keeping what they wrote: 10 numbers a feature and
    block to remember instead of 16, in the same time. A GPU's time goes into such writes: it keeps the 16.
    """
    # With CUDA's compiler and no GPU a machine is told so at each start; the plan names the device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    importlib.import_module("torch._inductor.compile_fx")
    settings: Any = importlib.import_module("torch._functorch.config")
    settings.ban_recompute_materialized_backward = torch.cuda.is_available()
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.use_fast_math = True  # on a GPU an exponential is one instruction, right to 2 units of fp32
    # float32 is meant where it is asked for: it is what a GPU's results are compared with.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    # A softmax over few rows is shared out among more threads instead, which is no news to its user.
    warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled", category=UserWarning)
    compiling: Any = importlib.import_module("torch._inductor.async_compile")
    pool = compiling_threads(compiling.get_compile_threads())
    compiling.AsyncCompile.pool = staticmethod(lambda: pool)
    if not torch.cuda.is_available():
        look_beside()


def compiling_threads(count: int) -> ThreadPoolExecutor:
    """Threads that start C++ compilers, which a Ctrl-C or the end of a terminal does not reach.

    It goes to all processes of a terminal, and a compiler inherits what its thread blocks: the run finishes
    its step and saves, instead of ending with a compiler that was killed.
    """
    shielded = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    return ThreadPoolExecutor(
        count, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, shielded)
    )


def look_beside() -> None:
    """Has the C++ compiler tried in a thread of its own, once: whoever asks for the result waits for it.

    Two looks at a time would both change PyTorch's flags for the compiler, and what is compiled with flags
    that no other process uses is compiled again at the next start. Where the compiler is missing or broken,
    the first graph gets the error.
    """
    isa: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    everything, sets = isa.valid_vec_isa_list, isa.supported_vec_isa_list

    def look() -> list[Any]:
        has = set(isa.x86_isa_checker())  # its names of what an x86 has; of any other processor none
        if not has or "ATEN_CPU_CAPABILITY" in os.environ:
            return everything()
        # PyTorch tries every set of instructions, up to eleven programs, and takes the first that works.
        return next(([one] for one in sets if has.issuperset(str(one).split()) and one), [])

    isa.valid_vec_isa_list = compiling_threads(1).submit(look).result
