"""One contender in a process of its own, so that its peak memory and its time to first step are its own."""

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from benchmarks.contenders import CONTENDERS, Work, batches_of
from nanogpt.run import keep_freed_memory

WARMUP_STEPS = 2  # after the first: allocators settle
REPLY_LIMIT_S = 3600.0  # a step that takes longer is taken for hung


class Started(NamedTuple):
    """What it took to reach the first step."""

    build_s: float
    """For parameters, optimizer and batches, without the imports before them."""
    first_step_s: float
    """For the first step, including its compilation."""
    idle_bytes: int
    """Memory of the process before it built anything: Python and torch."""


class Turn(NamedTuple):
    """Some steps in a row."""

    seconds: list[float]
    loss: float


class Memory(NamedTuple):
    """Peaks of a process (on CUDA of the allocator), in bytes."""

    steps: int
    """During steps, after warm-up and compilation."""
    whole: int
    """From the beginning: on a CPU that includes compilation."""


class WorkerError(RuntimeError):
    """A contender failed; the message is its traceback."""

    @property
    def last_line(self) -> str:
        """What failed, but not where."""
        return str(self).strip().splitlines()[-1]


class Served:
    """The object that `make(*arguments)` makes, in its own process: `ask` calls its methods, `close` ends it.

    `environment` is set when that process starts, so before it imports torch.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., Any],
        *arguments: Any,
        environment: dict[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        with environment_of(environment or {}), interrupts_ignored():
            self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the method returns. Raises WorkerError if it failed or the process ended."""
        self.send(method, *arguments)
        return self.answer(method)

    def send(self, method: str, *arguments: Any) -> None:
        """Calls the method without waiting for it, since several processes may have to meet in it."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, as `answer` will find
            self._connection.send((method, *arguments))

    def answer(self, method: str) -> Any:
        """What the call that was sent returned."""
        if not self._connection.poll(REPLY_LIMIT_S):
            raise WorkerError(f"{self.name} gave no answer to {method} within {REPLY_LIMIT_S:.0f} s")
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(timeout=10)
            raise WorkerError(
                f"{self.name} ended with status {self._process.exitcode}, out of memory perhaps"
            ) from error
        if kind == "error":
            raise WorkerError(f"{self.name} failed:\n{value}")
        return value

    def close(self) -> None:
        """Ends the process by closing its connection, or by signals if it does not end."""
        self._connection.close()
        for insist in (lambda: None, self._process.terminate, self._process.kill):
            insist()
            self._process.join(timeout=10)
            if not self._process.is_alive():
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Worker(Served):
    """A contender in its own process: `start` it, let it take turns, ask for its memory, `close` it."""

    def __init__(self, contender: str, work: Work, environment: dict[str, str] | None = None) -> None:
        super().__init__(contender, Contestant, contender, work, environment=environment)

    def start(self) -> Started:
        return self.ask("start")

    def turn(self, steps: int) -> Turn:
        return self.ask("turn", steps)

    def memory(self) -> Memory:
        return self.ask("memory")


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Makes processes that are started within it ignore Ctrl-C: whoever started them ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def environment_of(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started within it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The process's side: answers requests until the connection is closed."""
    made = None
    while True:
        try:
            method, *given = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            made = made or make(*arguments)
            value = getattr(made, method)(*given)
        except BaseException:  # of any kind: the other side reports it and goes on
            connection.send(("error", traceback.format_exc()))
            raise
        try:
            connection.send(("value", value))
        except ConnectionError:  # whoever asked has stopped waiting
            return


class Contestant:
    """A contender with its batches and clock."""

    def __init__(self, contender: str, work: Work) -> None:
        self.contender, self.work, self.count = contender, work, 0
        self.whole = 0

    def start(self) -> Started:
        idle_bytes = resident_bytes()
        begin = time.perf_counter()
        if self.work.all_keep_memory and self.work.device == "cpu":
            keep_freed_memory()
        self.batches = batches_of(self.work)
        self.step = CONTENDERS[self.contender](self.work)
        self.synchronize()
        build_s = time.perf_counter() - begin
        (first_step_s,), _ = self.take(1)
        self.take(WARMUP_STEPS)
        gc.collect()
        self.whole = peak_bytes(self.work.device)
        reset_peak(self.work.device)
        self.make_room()
        return Started(build_s, first_step_s, idle_bytes)

    def turn(self, steps: int) -> Turn:
        if self.work.device == "cpu":
            return self.take(steps)
        self.take(1)  # allocates again what was released after the last turn
        turn = self.take(steps)
        self.make_room()
        return turn

    def make_room(self) -> None:
        """Releases memory that is not in use: the others have to fit on the same GPU."""
        if self.work.device != "cpu":
            torch.cuda.empty_cache()

    def memory(self) -> Memory:
        steps = peak_bytes(self.work.device)
        return Memory(steps, max(self.whole, steps))

    def take(self, steps: int) -> Turn:
        """Takes the steps; on CUDA they are launched back to back, as in training, and timed as a mean."""
        if self.work.device == "cpu":
            timed = [self._timed() for _ in range(steps)]
            return Turn([seconds for seconds, _ in timed], timed[-1][1])
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            loss = self._step()
        self.synchronize()
        return Turn([(time.perf_counter() - begin) / steps], loss.item())

    def _timed(self) -> tuple[float, float]:
        begin = time.perf_counter()
        loss = self._step().item()
        return time.perf_counter() - begin, loss

    def _step(self) -> torch.Tensor:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        return self.step(batch)

    def synchronize(self) -> None:
        if self.work.device != "cpu":
            torch.accelerator.synchronize()


def peak_bytes(device: str) -> int:
    """Peak memory since `reset_peak`: of the process, or on CUDA of torch's allocator."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def reset_peak(device: str) -> None:
    """Resets the peak to what is in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Memory of this process now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024
