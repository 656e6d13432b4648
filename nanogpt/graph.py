"""torch.compile as this project uses it: one graph per function, with its own count of recompilations."""

import functools
import importlib
import logging
import os
import shlex
import signal
import subprocess
import types
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nanogpt.errors import UserError


def as_one_graph(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """`function`, compiled at its first call, with its own count of recompilations.

    `dynamic` is torch.compile's: False specialises on every size except those that are marked.

    torch.compile caches graphs by code object. Without a copy of it, two steps made from one source would
    share a cache, and the ninth model in a process would reach the limit of recompilations. Raises UserError
    if the compiler that PyTorch calls fails.
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

    def call(*arguments: Any) -> Any:
        try:
            return compiled()(*arguments)
        except errors_of_inductor().InductorError as error:
            raise_if_compiler_failed(error.inner_exception)
            raise

    return call


def errors_of_inductor() -> Any:
    """The module of the exceptions that PyTorch's compiler raises."""
    return importlib.import_module("torch._inductor.exc")


def raise_if_compiler_failed(error: Exception) -> None:
    """Raises UserError if `error` comes from the C or C++ compiler, not from PyTorch's work before it."""
    errors = errors_of_inductor()
    if isinstance(error, (errors.CppCompileError, errors.InvalidCxxCompiler, subprocess.CalledProcessError)):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = next((line for line in lines if "error: " in line), lines[0])
        raise UserError(
            f"the compiler that PyTorch calls fails ({what}), expected a C++ compiler with the headers of "
            f"this Python; install what is missing, or set --train.no-compile"
        ) from error


@functools.cache
def start_compiler() -> None:
    """Imports the compiler, sets it up, and starts its probe of the C++ compiler on a thread.

    With an empty cache the probe takes some seconds, beside what the caller does. The imports finish first:
    two threads importing the same modules would see them half initialised. From here on all graphs of a
    process without a GPU recompute norms and GELUs in the backward pass instead of saving them: 10 numbers
    per feature and block instead of 16, in the same time. On a GPU recomputing costs time, so it saves the
    16.
    """
    # On a machine with CUDA's compiler but no GPU torch warns at each start; the plan names the device
    # anyway.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    importlib.import_module("torch._inductor.compile_fx")
    settings: Any = importlib.import_module("torch._functorch.config")
    settings.ban_recompute_materialized_backward = torch.cuda.is_available()
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.use_fast_math = True  # on a GPU an exponential is one instruction, accurate to 2 ulp of fp32
    # Whoever asks for float32 means it: a GPU's results are compared with it.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    # Inductor splits a softmax over few rows among more threads instead; that needs no warning.
    warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled", category=UserWarning)
    compiling: Any = importlib.import_module("torch._inductor.async_compile")
    pool = compiling_threads(compiling.get_compile_threads())
    compiling.AsyncCompile.pool = staticmethod(lambda: pool)
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    builder.run_compile_cmd = named_when_whole(builder.run_compile_cmd)
    quote_libraries()
    if not torch.cuda.is_available():
        look_beside()


def compiling_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose C++ compilers neither Ctrl-C nor a closed terminal reaches.

    Such a signal goes to all processes of a terminal, and a process inherits the signals that its parent
    thread blocks. So the run finishes its step and saves, instead of failing with a killed compiler.
    """
    shielded = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    return ThreadPoolExecutor(
        count, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, shielded)
    )


def named_when_whole(run: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """PyTorch's `run` of a compiler's command line in a folder, but the result has its name only once whole.

    PyTorch takes whatever file has that name. Half of one, of a compiler that was killed or that still
    writes for a run that has ended, would be an ImportError in every run with the same cache.
    """

    def call(cmd_line: str, cwd: str) -> None:  # the names that PyTorch passes them by
        words = shlex.split(cmd_line)
        place = words.index("-o") + 1
        result = Path(cwd, words[place])
        part = result.with_name(f"{result.name}.{uuid.uuid4().hex}")
        try:
            run(shlex.join([*words[:place], str(part), *words[place + 1 :]]), cwd)
            part.replace(result)
        finally:
            part.unlink(missing_ok=True)

    return call


def quote_libraries() -> None:
    """Lets PyTorch lie in a folder whose name has a space: of the folders in a compiler's command line it
    quotes all but that of its own libraries."""
    extension: Any = importlib.import_module("torch.utils.cpp_extension")
    extension.TORCH_LIB_PATH = shlex.quote(extension.TORCH_LIB_PATH)


def look_beside() -> None:
    """Probes the C++ compiler once, on its own thread; whoever asks for the result waits for it.

    Two probes at a time would both modify PyTorch's compiler flags, and code compiled with flags that no
    other process uses is compiled again at the next start. If the compiler is missing or broken, the first
    graph raises the error.
    """
    isa: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    everything, sets = isa.valid_vec_isa_list, isa.supported_vec_isa_list

    def look() -> list[Any]:
        has = set(isa.x86_isa_checker())  # PyTorch's names for this x86's instructions; empty on others
        if not has or "ATEN_CPU_CAPABILITY" in os.environ:
            return everything()
        # PyTorch would try every instruction set, up to eleven programs, only to take the first that works.
        return next(([one] for one in sets if has.issuperset(str(one).split()) and one), [])

    isa.valid_vec_isa_list = compiling_threads(1).submit(look).result
