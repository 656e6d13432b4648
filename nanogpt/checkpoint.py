"""Checkpoints: the state of a run on disk, through Orbax.

A checkpoint is a folder named by its step, whole from the moment it has that name: Orbax writes under another
name and renames at the end.

    12/state/      one array per leaf, named by its path in the tree ("params/wte.weight")
    12/metadata/   one JSON file: what a reader needs to know before it reads an array
    12/metrics/    one JSON file: the validation loss, if there is one

Under torch.distributed each rank writes its own shards and reads its own parts; the folder looks the same to
any reader, on any number of ranks, or none. Ranks share the file system.

Reading a checkpoint executes no code. Importing Orbax and jax takes seconds, so it happens with the first
array (for a save on its thread, while training goes on); steps, metadata and losses are read without them.
"""

import functools
import json
import logging
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import folders, tree
from nanogpt.arrays import Arrays, Index, Part, to_array, to_tensor
from nanogpt.errors import UserError
from nanogpt.ranks import Ranks
from nanogpt.tree import Tree
from nanogpt.units import format_bytes

CHECKPOINTS = "checkpoints"
"""The folder in a run directory that holds its checkpoints."""
_STATE, _METADATA, _METRICS = "state", "metadata", "metrics"
_PARAMS = "params/"
_STAGING = "shards-"
SHARED_TIMEOUT_S = 30.0
"""How long a network file system may take to show one machine what another has made."""


class Checkpointer:
    """The checkpoints of one run: the last `keep` and the one with the lowest validation loss, no others.

    Saves run on a thread, one at a time, and whatever reads here waits for the one that is running. One run
    may save to a directory while any number of processes read. Call `close` before the program ends, or a
    save that is still running is lost.

    Under torch.distributed, create it after `init_process_group`, and call each method on all ranks in the
    same order: rank 0 decides which steps there are, and a failure on one rank is raised on all. Leaves are
    DTensors, or plain tensors that are equal on all ranks; `metadata` and `val_loss` are those of rank 0.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2):
        """Creates nothing on disk. Raises UserError unless `keep` is at least 1."""
        if keep < 1:
            raise UserError(f"keeping {keep} checkpoints would leave none to resume from; keep at least 1")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._manager: Any = None
        self._ranks, self._writers = Ranks(), Ranks()  # for the caller's thread, and for the worker

    def check(self, state: Tree) -> None:
        """Raise UserError if a run could not keep its checkpoints of `state` here; creates nothing.

        Call it before a run starts. At most `keep`, the best, and the one being written exist at a time.
        """
        to_come = max(1, self._keep + 2 - len(_finished_steps(self._directory)))
        self._ranks.agree(lambda: _require_room(self._directory, to_come * _nbytes(state)))

    def save(
        self, step: int, state: Tree, *, metadata: dict[str, Any] | None = None, val_loss: float | None = None
    ) -> None:
        """Start a save; on return, `state` has been copied to host memory and may be overwritten.

        A rank copies only what it will write: its shards that no earlier rank holds as well. Writing goes on
        while the caller computes and communicates. Waits for the previous save, and raises what that one
        raised. `metadata` is anything that JSON can hold. Raises UserError if the directory holds this or a
        later step, cannot be written, or is full.
        """
        self.wait()
        self._ranks.agree(lambda: self._require_free(step, _nbytes(state)))
        about: dict[str, Any] = json.loads(json.dumps(metadata or {}))
        metrics = {"val_loss": val_loss} if val_loss is not None and math.isfinite(val_loss) else None
        leaves = tree.paths(state)
        if not self._ranks.joined:
            arrays = {name: to_array(leaf) for name, leaf in leaves.items()}
            self._pending = self._worker.submit(self._write, step, arrays, about, metrics)
            return
        parts = self._parts(leaves)
        parts = {name: part for name, part in parts.items() if part.is_first and not part.is_empty}
        shards = {name: to_array(_import_shards().local(leaves[name])) for name in parts}
        self._pending = self._worker.submit(
            self._write_shards, step, list(leaves), shards, parts, about, metrics
        )

    def latest(self) -> int | None:
        """The newest finished step; None if there is none. Interrupted saves do not count."""
        self.wait()
        return self._ranks.decide(lambda: max(_finished_steps(self._directory), default=None))

    def best(self) -> int | None:
        """The finished step with the lowest validation loss (the newest of equals); None if none has one."""
        self.wait()
        return self._ranks.decide(lambda: _best_step(self._directory))

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given. Raises UserError if there is no such step or its file is damaged."""
        self.wait()
        return self._ranks.decide(lambda: _read_metadata(self._directory, step))

    def restore(self, step: int, like: Tree) -> Tree:
        """The state saved at `step`, in the structure of `like`, on the meshes and devices of its leaves.

        The placement of a leaf may differ from when it was saved; each rank reads its own part. Names, shapes
        (of whole tensors) and dtypes are compared before any array is read. Raises UserError, naming the
        leaf, if one differs; also if there is no such step or its files are damaged.
        """
        self.wait()
        # Not returned by the action, since `agree` sends results to all ranks, and a state is too large.
        restored: list[Tree] = []
        self._ranks.agree(lambda: restored.append(self._restore(step, like)))
        return restored[0]

    def _restore(self, step: int, like: Tree) -> Tree:
        _require_step(self._directory, step)
        saved, expected = _describe_arrays(self._directory, step), tree.paths(like)
        if differences := tree.diff(saved, expected):
            raise UserError(
                f"the checkpoint of step {step} in {self._directory} is of another model or optimizer: "
                f"{differences[0]} ({len(differences)} of {len({*saved, *expected})} leaves differ); "
                "use the config in its metadata, or another directory"
            )
        if not self._ranks.joined:
            arrays = _read_arrays(self._directory, step, dict.fromkeys(expected, ()))
            restored = [to_tensor(arrays[name], leaf.device) for name, leaf in expected.items()]
            return tree.unflatten(like, restored)
        indices = {name: part.index for name, part in self._parts(expected).items()}
        arrays = _read_arrays(self._directory, step, indices)
        placed_like = _import_shards().placed_like
        return tree.unflatten(like, [placed_like(leaf, arrays[name]) for name, leaf in expected.items()])

    def _parts(self, leaves: dict[str, Tensor]) -> dict[str, Part]:
        part_of = _import_shards().part_of
        return {name: part_of(leaf, rank=self._ranks.rank) for name, leaf in leaves.items()}

    def wait(self) -> None:
        """Return when no save is running. Raises UserError, once, if the last one failed.

        Raises RuntimeError if it failed because a rank has ended.
        """
        if self._pending is None:
            return
        try:
            self._pending.result()
        except (OSError, ValueError) as error:
            # The manager counts the failed step as saved; reopening it also removes what that step left.
            self._manager = None
            raise UserError(
                f"saving a checkpoint to {self._directory} failed (earlier ones are whole): "
                f"{_first_line(error)}; make room or choose another directory, and resume"
            ) from error
        finally:
            self._pending = None

    def close(self) -> None:
        """Wait for the last save and end the thread. Raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def _require_free(self, step: int, need_bytes: int) -> None:
        latest = max(_finished_steps(self._directory), default=None)
        if latest is not None and latest >= step:
            raise UserError(
                f"{self._directory} already holds a checkpoint of step {latest}, expected none from step "
                f"{step} on; resume from step {latest} or save to another directory"
            )
        _require_room(self._directory, need_bytes)

    def _write(
        self, step: int, state: dict[str, Any], metadata: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        edge = _import_edge()
        if self._manager is None:
            self._manager = edge.open_manager(self._directory, self._keep)
        edge.save(self._manager, step, state, metadata, metrics)

    def _write_shards(
        self,
        step: int,
        names: list[str],
        shards: Arrays,
        parts: dict[str, Part],
        metadata: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Runs on all ranks: each writes its shards, and then rank 0 makes a checkpoint of them all."""
        edge = _import_edge()
        rank = self._writers.rank
        staging = self._writers.decide(lambda: _make_staging(self._directory, step))

        def write_own() -> list[Path]:
            if not appears(staging):
                raise FileNotFoundError(
                    f"rank {rank} does not see {staging}, which rank 0 has made: the machines do not share it"
                )
            return edge.write_shards(staging, rank, shards, parts)

        def finish() -> None:
            staged = edge.Staged(tuple(folder for rank_folders in folders for folder in rank_folders))
            self._write(step, dict.fromkeys(names, staged), metadata, metrics)

        try:
            folders = self._writers.agree(write_own)
            self._writers.decide(finish)
        finally:
            if rank == 0:
                shutil.rmtree(staging, ignore_errors=True)


def load_params(directory: Path, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters (on the CPU, no optimizer state) and the metadata of `step`, by default the newest.

    Raises UserError if `directory` holds no such checkpoint or its files are damaged.
    """
    directory = directory.absolute()
    step = max(_finished_steps(directory), default=0) if step is None else step
    _require_step(directory, step)
    names = [name for name in _describe_arrays(directory, step) if name.startswith(_PARAMS)]
    arrays = _read_arrays(directory, step, dict.fromkeys(names, ()))
    params = {name.removeprefix(_PARAMS): to_tensor(arrays[name], torch.device("cpu")) for name in names}
    return params, _read_json(directory, step, _METADATA)


def _finished_steps(directory: Path) -> list[int]:
    """The finished steps, ascending: a running or killed save is in a folder whose name is not a number.

    Raises UserError if `directory` cannot be read.
    """
    try:
        if not directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())
    except OSError as error:  # such as a name that is too long, or somebody else's folder
        raise UserError(
            f"checkpoints in {directory} cannot be read ({error.strerror}); choose another directory"
        ) from error


def _best_step(directory: Path) -> int | None:
    losses = {
        step: _read_json(directory, step, _METRICS)["val_loss"]
        for step in _finished_steps(directory)
        if (directory / str(step) / _METRICS / _METRICS).exists()
    }
    return min(losses, key=lambda step: (losses[step], -step), default=None)


def _read_metadata(directory: Path, step: int) -> dict[str, Any]:
    _require_step(directory, step)
    return _read_json(directory, step, _METADATA)


def _make_staging(directory: Path, step: int) -> Path:
    """A new folder for the shards of `step`; removes those of saves that were killed.

    Its name is unique, so that a process of a killed attempt that is still writing cannot reach it.
    """
    for left in directory.glob(f"*.{_STAGING}*"):
        shutil.rmtree(left)
    staging = directory / f"{step}.{_STAGING}{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    return staging


def appears(path: Path) -> bool:
    """Whether `path` exists, or this machine sees it within the time that a network file system may take."""
    deadline = time.monotonic() + SHARED_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _require_step(directory: Path, step: int) -> None:
    steps = _finished_steps(directory)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint; give a directory that a training run has saved to")
    if step not in steps:
        there = ", ".join(str(step) for step in steps)
        raise UserError(f"{directory} holds no checkpoint of step {step}; choose one that it holds: {there}")


def _require_room(directory: Path, need_bytes: int) -> None:
    """Raise UserError unless `directory`, or the folder it would be made in, is writable and has the room,
    and its name is one that Orbax takes."""
    if any("\udc80" <= character <= "\udcff" for character in str(directory.absolute())):
        raise UserError(
            f"checkpoints cannot be saved to {str(directory)!a}, expected a name in UTF-8; choose another "
            "directory, or a locale that is UTF-8"
        )
    folder = folders.nearest(directory)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(
            f"checkpoints cannot be saved to {directory}: {folder} is not a folder that you may write to; "
            "choose another directory"
        )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise UserError(
            f"{folder} has {format_bytes(free_bytes)} free and checkpoints need {format_bytes(need_bytes)}; "
            "make room or choose another directory"
        )


def _nbytes(state: Tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(state))


def _read_json(directory: Path, step: int, item: str) -> dict[str, Any]:
    with _damage_reported(directory, step):
        return json.loads((directory / str(step) / item / item).read_text())


def _describe_arrays(directory: Path, step: int) -> dict[str, Any]:
    """Something with `.shape` and `.dtype` for each saved array, by name; reads no array."""
    edge = _import_edge()
    with _damage_reported(directory, step):
        return edge.describe(directory / str(step) / _STATE)


def _read_arrays(directory: Path, step: int, indices: dict[str, Index]) -> Arrays:
    edge = _import_edge()
    with _damage_reported(directory, step):
        return edge.read(directory / str(step) / _STATE, indices)


@contextmanager
def _damage_reported(directory: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError) as error:
        what = f"{error} is missing" if isinstance(error, LookupError) else _first_line(error)
        raise UserError(
            f"the checkpoint of step {step} in {directory} is damaged: {what}; "
            f"remove {directory / str(step)} to use the one before it"
        ) from error


def _first_line(error: Exception) -> str:
    """What went wrong, without the settings that TensorStore adds: a thousand characters of JSON."""
    return str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0]


def _import_shards() -> Any:
    from nanogpt import shards

    return shards


@functools.cache
def _import_edge() -> Any:
    """`nanogpt.orbax_edge`, imported at the first call and silenced: what matters arrives as an exception."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the GPU is torch's alone
    from nanogpt import orbax_edge

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Of several arrays that cannot be read one is raised, and asyncio may log the others at any time.
    logging.getLogger("asyncio").addFilter(lambda record: "tensorstore_spec" not in record.getMessage())
    # After a failed read or write Orbax closes its event loop, though threads with others still report to it.
    report, noise = sys.unraisablehook, "Event loop is closed"
    sys.unraisablehook = lambda event: None if str(event.exc_value) == noise else report(event)
    return orbax_edge
