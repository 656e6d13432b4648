"""A rank of a sharded job in a process of its own, for benchmarks that start their processes themselves."""

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.contenders import SEED, Work, batches_of, make_optimizer, step_of
from benchmarks.worker import Served, peak_bytes, reset_peak, resident_bytes
from nanogpt import sharding, tree
from nanogpt.checkpoint import Checkpointer
from nanogpt.model import GPT2Config
from nanogpt.train import TrainState, init_state

TIMEOUT = timedelta(minutes=30)
TINY = GPT2Config(vocab_size=256, block_size=64, n_layer=1, n_head=2, n_embd=64)
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library return every larger block as soon as it is freed: what is resident is in use."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Processes on this machine and what they do; one process alone is not sharded."""

    work: Work
    """Its `batch_size` counts the sequences of one rank."""
    replicate: int = 1
    shard: int = 1
    reshard_after_forward: bool = False
    threads: int = 1
    """Per process."""

    @property
    def size(self) -> int:
        return self.replicate * self.shard


class Resident(NamedTuple):
    """Memory of a rank's process beyond what it had before it built anything, in bytes."""

    rest: int
    """Between steps."""
    peak: int
    """The most during steps, after two in which allocators settle."""


class Save(NamedTuple):
    """Seconds of one checkpoint."""

    blocks_s: float
    """Until `save` lets the loop go on."""
    on_disk_s: float


class Rank:
    """One process's side of a layout."""

    def __init__(self, layout: Layout, rank: int, meeting: Path) -> None:
        torch.set_num_threads(layout.threads)
        self.layout, self.rank, self.count = layout, rank, 0
        self.mesh = None
        if layout.size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=layout.size,
                timeout=TIMEOUT,
            )
            self.mesh = sharding.make_mesh("cpu", (layout.replicate, layout.shard))

    def start(self) -> float:
        """Builds the step, takes three steps, and returns the seconds of the first one."""
        self.build(self.layout.work)
        first_step_s, *_ = self.turn(3)
        return first_step_s

    def build(self, work: Work) -> None:
        optimizer = make_optimizer(work)
        generator = torch.Generator().manual_seed(SEED)
        self.state = init_state(work.model, optimizer, generator, mesh=self.mesh)
        self.batches = batches_of(work, self.rank, self.layout.size)
        # The step writes new values into the state's own memory, so `self.state` stays the newest.
        self.step = step_of(
            self.state,
            optimizer,
            work,
            mesh=self.mesh,
            reshard_after_forward=self.layout.reshard_after_forward,
        )

    def turn(self, steps: int) -> list[float]:
        """Seconds of each step; it ends with the loss of all ranks, so no rank is ahead."""
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.loss = self.step(self.batches[self.count % len(self.batches)]).item()
            seconds.append(time.perf_counter() - begin)
            self.count += 1
        return seconds

    def last_loss(self) -> float:
        return self.loss

    def bytes_at_rest(self) -> int:
        """Bytes of the state's storages that this rank holds."""
        return state_bytes(sharding.local(self.state))

    def saves(self, folder: Path, count: int) -> list[Save]:
        """Timings of `count` checkpoints, after one that loads the library."""
        timings, checkpointer = [], Checkpointer(folder, keep=1)
        for step in range(1, count + 2):
            begin = time.perf_counter()
            checkpointer.save(step, self.state, metadata={})
            blocks_s = time.perf_counter() - begin
            checkpointer.wait()
            timings.append(Save(blocks_s, time.perf_counter() - begin))
        checkpointer.close()
        return timings[1:]

    def resident(self, steps: int) -> Resident:
        """Builds the step and measures this process, after a tiny step has loaded what every step needs."""
        self.build(replace(self.layout.work, model=TINY))
        self.turn(2)
        del self.state, self.step
        gc.collect()
        before = resident_bytes()
        self.build(self.layout.work)
        self.turn(2)
        gc.collect()
        rest = resident_bytes() - before
        reset_peak("cpu")
        self.turn(steps)
        return Resident(rest, peak_bytes("cpu") - before)


def state_bytes(state: TrainState) -> int:
    """Bytes of all storages in a tree of plain tensors, each counted once."""
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in tree.leaves(state)}
    return sum(storages.values())


class Job:
    """All ranks of a layout; whatever they are asked to do, they do at the same time."""

    def __init__(self, ranks: list[Served]) -> None:
        self.ranks = ranks

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What the method returned on each rank."""
        for rank in self.ranks:
            rank.send(method, *arguments)
        return [rank.answer(method) for rank in self.ranks]


@contextlib.contextmanager
def started(layout: Layout, *, exact_malloc: bool = False) -> Iterator[Job]:
    """The processes of a layout; they end when the context is left."""
    # Threads that spin while they wait for work would take the cores from whoever's turn it is.
    environment = {"OMP_NUM_THREADS": str(layout.threads), "OMP_WAIT_POLICY": "passive"}
    environment |= EXACT_MALLOC if exact_malloc else {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-ranks-"))
        meeting = Path(folder, "meeting")
        ranks = []
        for rank in range(layout.size):
            served = Served(f"rank {rank}", Rank, layout, rank, meeting, environment=environment)
            ranks.append(stack.enter_context(served))
        yield Job(ranks)
