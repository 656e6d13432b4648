"""The C++ compiler is tried once, with as few programs as will do, whoever asks; no Ctrl-C ends it."""

import contextlib
import importlib
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.errors import UserError
from nanogpt.graph import as_one_graph, errors_of_inductor, look_beside, quote_libraries, start_compiler

X86 = ["avx2", "avx512", "avx512_vnni", "amx_tile"]


class Instructions:
    """A set of instructions that takes a moment to be tried."""

    def __init__(self, name: str, *, works: bool, tried: list[str]) -> None:
        self.name, self.works, self.tried = name, works, tried

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.tried.append(self.name)
        time.sleep(0.05)
        return self.works


@pytest.fixture
def isa(monkeypatch: pytest.MonkeyPatch) -> Any:
    isa = importlib.import_module("torch._inductor.cpu_vec_isa")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(isa, "x86_isa_checker", lambda: X86)
    monkeypatch.setattr(isa, "valid_vec_isa_list", lambda: ["PyTorch's own"])
    return isa


def test_the_first_instructions_that_work_are_tried_and_no_others_and_by_one_thread(
    isa: Any, monkeypatch: pytest.MonkeyPatch
):
    tried: list[str] = []
    names = {
        "asimd": True,
        "avx512 avx512_vnni amx_tile": False,
        "avx512 avx512_vnni": True,
        "avx512": True,
        "avx2": True,
    }
    sets = [Instructions(name, works=works, tried=tried) for name, works in names.items()]
    monkeypatch.setattr(isa, "supported_vec_isa_list", sets)
    look_beside()
    together = threading.Barrier(3)

    def ask(_: int) -> str:
        together.wait(timeout=10)
        return str(isa.pick_vec_isa())

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, range(3))) == ["avx512 avx512_vnni"] * 3
    assert tried == ["avx512 avx512_vnni amx_tile", "avx512 avx512_vnni"]


@pytest.mark.parametrize(("has", "capability"), [([], None), (X86, "avx2")])
def test_another_processor_and_a_wish_are_left_to_pytorch(
    has: list[str], capability: str | None, isa: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(isa, "x86_isa_checker", lambda: has)
    if capability:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    look_beside()
    assert isa.valid_vec_isa_list() == ["PyTorch's own"]


def test_who_asks_gets_the_error_of_a_compiler_that_is_not_there(isa: Any, monkeypatch: pytest.MonkeyPatch):
    def missing() -> list[str]:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(isa, "x86_isa_checker", missing)
    look_beside()
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        isa.pick_vec_isa()


NO_HEADERS = """
case "$*" in *--version*) echo g++ 13; exit 0; esac
echo "fatal error: Python.h: No such file" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("script", "what"),
    [("exit 1", "No working C++ compiler found in "), (NO_HEADERS, "fatal error: Python.h: No such file")],
    ids=["none that starts", "no headers"],
)
def test_a_compiler_that_fails_is_a_sentence(script: str, what: str, tmp_path: Path):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    start_compiler()
    config: Any = importlib.import_module("torch._inductor.config")
    caches: Any = importlib.import_module("torch._inductor.utils")
    isa: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    isa.valid_vec_isa_list()  # the look at the real compiler is over
    with (
        caches.fresh_cache(),
        config.patch({"cpp.cxx": (None, str(compiler))}),
        pytest.raises(UserError, match=rf"PyTorch calls fails \({re.escape(what)}.*set --train.no-compile"),
    ):
        as_one_graph(lambda x: x.sin() + 1)(torch.ones(100))


def test_pytorch_may_lie_in_any_folder(monkeypatch: pytest.MonkeyPatch):
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    folder = "/it's a (new) folder/lib"
    monkeypatch.setattr(importlib.import_module("torch.utils.cpp_extension"), "TORCH_LIB_PATH", folder)
    quote_libraries()
    command = builder.CppBuilder("kernel", "kernel.cpp", builder.CppTorchOptions()).get_command_line()
    assert f"-L{folder}" in shlex.split(command)


def test_a_signal_of_the_terminal_does_not_reach_a_compiler():
    program = """
import os, signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    os.kill(os.getpid(), number)
print("compiled")
"""
    start_compiler()
    pool = importlib.import_module("torch._inductor.async_compile").AsyncCompile.pool()
    compiler = pool.submit(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert compiler.result().stdout == "compiled\n"


WRITES = """#!/bin/sh
printf who > "$2"
test -e kernel.so && exit 1
{}
printf le >> "$2"
"""


@pytest.mark.parametrize(("end", "left"), [("", "whole"), ("kill -KILL $$", None)], ids=["works", "killed"])
def test_what_is_compiled_has_its_name_when_it_is_whole(end: str, left: str | None, tmp_path: Path):
    compiler, result = tmp_path / "a compiler", tmp_path / "kernel.so"
    compiler.write_text(WRITES.format(end))
    compiler.chmod(0o755)
    start_compiler()
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    with contextlib.nullcontext() if left else pytest.raises(errors_of_inductor().CppCompileError):
        builder.run_compile_cmd(f"'{compiler}' -o {result}", cwd=str(tmp_path))
    assert (result.read_text() if result.exists() else None) == left
    assert set(tmp_path.iterdir()) <= {compiler, result}
