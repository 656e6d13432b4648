"""What every test shares: checked shapes, two threads on any machine, and a cache that is not the user's."""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

# Before torch is imported, and for the processes that a test starts: golden numbers are those of two threads.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["OMP_WAIT_POLICY"] = "passive"  # spinning threads crawl where others use the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub fails at once

import jaxtyping
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Tests are the CPU's, with its golden numbers, where there are GPUs too; `-m gpu` runs those of GPUs."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a CUDA device, and torch sees none here; leave it out")


_jaxtyped = jaxtyping.jaxtyped
_codes: dict[CodeType, CodeType] = {}


def _checked_unless_compiled(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """jaxtyping's decorator, except that torch.compile, unable to trace the checks, sees the bare function.

    torch.compile keeps what it compiled, and counts recompilations, by code object; so each wrapper has one
    of its own, as the function had.
    """
    if function is None:
        return functools.partial(_checked_unless_compiled, typechecker=typechecker)
    if torch.compiler.is_compiling():  # a function inside a compiled one is decorated while that is traced
        return function
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = _checked_unless_compiled(function.__init__, typechecker=typechecker)
        return function
    checked = _jaxtyped(function, typechecker=typechecker)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return function(*args, **kwargs) if torch.compiler.is_compiling() else checked(*args, **kwargs)

    own = wrapper.__code__.replace(co_name=function.__name__, co_qualname=function.__qualname__)
    wrapper.__code__ = _codes.setdefault(function.__code__, own)
    return wrapper


# What jaxtyping's hook makes of a module must not be left where a program without the hook would load it.
sys.dont_write_bytecode = True
jaxtyping.jaxtyped = _checked_unless_compiled
jaxtyping.install_import_hook("nanogpt", "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project's cache directory for this run of the tests, so that none reads or fills the user's."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("NANOGPT_CACHE", str(path))
        yield path
