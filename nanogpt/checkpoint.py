"""Checkpoints: the state of a run on disk, through Orbax.

A checkpoint is a folder named by its step, whole from the moment it has that name: Orbax writes under another
name and renames at the end.

    12/state/      one array per leaf, named by its path in the tree ("params/wte.weight")
    12/metadata/   one JSON file: what a reader needs to know before it reads an array
    12/metrics/    one JSON file: the validation loss, where there is one

Reading executes nothing. Importing Orbax and jax takes seconds, so it happens with the first array (on its
thread for a save, while training goes on); steps, metadata and losses are read without them.
"""

import functools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from nanogpt import tree
from nanogpt.errors import UserError
from nanogpt.tree import Tree

Arrays = dict[str, np.ndarray]
"""The leaves of a tree in host memory, by their paths."""

_STATE, _METADATA, _METRICS = "state", "metadata", "metrics"
_PARAMS = "params/"


class Checkpointer:
    """The checkpoints of one run: the last `keep` and the one with the lowest validation loss, no others.

    Saves run on a thread, one at a time. One process may save to a directory while any number read it. Call
    `close` before the program ends: a save that is still running then is lost.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        """Create nothing on disk. Raises UserError unless `keep` is at least 1."""
        if keep < 1:
            raise UserError(f"keeping {keep} checkpoints would leave none to resume from; keep at least 1")
        self._directory = directory.absolute()
        self._keep = keep
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._manager: Any = None

    def check(self, state: Tree) -> None:
        """Raise UserError if a run could not keep its checkpoints of `state` here; creates nothing.

        To be called before a run starts. At most there are `keep`, the best, and the one being written.
        """
        to_come = max(1, self._keep + 2 - len(_finished_steps(self._directory)))
        _require_room(self._directory, to_come * _nbytes(state))

    def save(
        self, step: int, state: Tree, *, metadata: dict[str, Any], val_loss: float | None = None
    ) -> None:
        """Start to save; once it returns, `state` is copied to host memory and may be overwritten.

        Waits for the save before, and raises what that one raised. `metadata` is anything that JSON can hold.
        Raises UserError where the directory holds this or a later step, cannot be written, or is full.
        """
        self.wait()
        latest = self.latest()
        if latest is not None and latest >= step:
            raise UserError(
                f"{self._directory} already holds a checkpoint of step {latest}, expected none from step "
                f"{step} on; resume from step {latest} or save to another directory"
            )
        _require_room(self._directory, _nbytes(state))
        metadata = json.loads(json.dumps(metadata))
        metrics = {"val_loss": val_loss} if val_loss is not None and math.isfinite(val_loss) else None
        arrays = {name: _to_array(leaf) for name, leaf in tree.paths(state).items()}
        self._pending = self._worker.submit(self._write, step, arrays, metadata, metrics)

    def latest(self) -> int | None:
        """The newest finished step; None where there is none. Running and interrupted saves do not count."""
        return max(_finished_steps(self._directory), default=None)

    def best(self) -> int | None:
        """The finished step of lowest validation loss (of equals the newest); None where none has one."""
        losses = {
            step: _read_json(self._directory, step, _METRICS)["val_loss"]
            for step in _finished_steps(self._directory)
            if (self._directory / str(step) / _METRICS / _METRICS).exists()
        }
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given. Raises UserError where there is no such step or its file is damaged."""
        _require_step(self._directory, step)
        return _read_json(self._directory, step, _METADATA)

    def restore(self, step: int, like: Tree) -> Tree:
        """The state saved at `step`, in the structure of `like` and on the devices of its leaves.

        Names, shapes and dtypes are compared before an array is read. Raises UserError, naming the leaf, if
        one differs; also if there is no such step or its files are damaged.
        """
        _require_step(self._directory, step)
        expected = tree.paths(like)
        if differences := tree.diff(_describe_arrays(self._directory, step), expected):
            raise UserError(
                f"the checkpoint of step {step} in {self._directory} is of another model or optimizer: "
                f"{differences[0]} ({len(differences)} of {len(expected)} leaves differ); "
                "use the config in its metadata, or another directory"
            )
        arrays = _read_arrays(self._directory, step, list(expected))
        return tree.unflatten(
            like, [_to_tensor(arrays[name], leaf.device) for name, leaf in expected.items()]
        )

    def wait(self) -> None:
        """Return when no save is running. Raises UserError, once, if the last one failed."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except (OSError, ValueError) as error:
            # It counts the failed step as saved; opening it anew for the next save also clears what is left.
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

    def _write(
        self, step: int, arrays: Arrays, metadata: dict[str, Any], metrics: dict[str, float] | None
    ) -> None:
        ocp = _import_orbax()
        if self._manager is None:
            self._manager = _open_manager(ocp, self._directory, self._keep)
        items = {_STATE: ocp.args.PyTreeSave(arrays), _METADATA: ocp.args.JsonSave(metadata)}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def load_params(directory: Path, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters, on the CPU and without the optimizer's state, and the metadata; by default the newest.

    Raises UserError where `directory` holds no such checkpoint or its files are damaged.
    """
    directory = directory.absolute()
    step = max(_finished_steps(directory), default=0) if step is None else step
    _require_step(directory, step)
    names = [name for name in _describe_arrays(directory, step) if name.startswith(_PARAMS)]
    arrays = _read_arrays(directory, step, names)
    params = {name.removeprefix(_PARAMS): _to_tensor(arrays[name], torch.device("cpu")) for name in names}
    return params, _read_json(directory, step, _METADATA)


def _finished_steps(directory: Path) -> list[int]:
    """Ascending. A save that is running, or was killed, lies in a folder whose name is no number."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())


def _require_step(directory: Path, step: int) -> None:
    steps = _finished_steps(directory)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint; give a directory that a training run has saved to")
    if step not in steps:
        there = ", ".join(str(step) for step in steps)
        raise UserError(f"{directory} holds no checkpoint of step {step}; choose one that it holds: {there}")


def _require_room(directory: Path, need_bytes: int) -> None:
    """Raise UserError unless `directory`, or the folder it would be made in, is writable and has the room."""
    folder = next(path for path in (directory, *directory.parents) if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(
            f"checkpoints cannot be saved to {directory}: {folder} is not a folder that you may write to; "
            "choose another directory"
        )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise UserError(
            f"{folder} has {free_bytes / 1e9:,.3f} GB free and checkpoints need {need_bytes / 1e9:,.3f} GB; "
            "make room or choose another directory"
        )


def _nbytes(state: Tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(state))


def _read_json(directory: Path, step: int, item: str) -> dict[str, Any]:
    with _damage_reported(directory, step):
        return json.loads((directory / str(step) / item / item).read_text())


def _describe_arrays(directory: Path, step: int) -> dict[str, Any]:
    """Something with `.shape` and `.dtype` for each saved array, by name; reads no array."""
    handler = _array_handler(_import_orbax())
    with _damage_reported(directory, step):
        return handler.metadata(directory / str(step) / _STATE).tree


def _read_arrays(directory: Path, step: int, names: list[str]) -> Arrays:
    ocp = _import_orbax()
    wanted = ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0),
        restore_args=dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    with _damage_reported(directory, step):
        return _array_handler(ocp).restore(directory / str(step) / _STATE, args=wanted)


@contextmanager
def _damage_reported(directory: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint of step {step} in {directory} is damaged: {_first_line(error)}; "
            f"remove {directory / str(step)} to use the one before it"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _to_array(leaf: Tensor) -> np.ndarray:
    """A copy in host memory that shares nothing with `leaf`."""
    host = leaf.detach().to("cpu", copy=True).contiguous()
    if host.dtype == torch.bfloat16:  # which numpy lacks: the same bits under a dtype that Orbax knows
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()


def _to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


@functools.cache
def _import_orbax() -> Any:
    """The package, imported now and made quiet: what matters arrives as an exception."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the GPU is torch's alone
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # After one failed read or write Orbax closes its event loop; the others still report to it, from threads.
    report, noise = sys.unraisablehook, "Event loop is closed"
    sys.unraisablehook = lambda event: None if str(event.exc_value) == noise else report(event)
    return ocp


def _array_handler(ocp: Any) -> Any:
    """Writes numpy arrays; reads them, and what several processes have written in shards as jax arrays."""
    import jax

    kinds = ocp.type_handlers
    in_memory = kinds.NumpyHandler(deepcopy_host_arrays=False)  # `_to_array` has copied already
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,  # it saves a tenth of the space for twice the time
        restore_concurrent_gb=1,  # bounds the memory on top of the arrays themselves
        type_handler_registry=kinds.create_type_handler_registry(
            (np.ndarray, in_memory), (jax.Array, kinds.ArrayHandler())
        ),
    )


def _open_manager(ocp: Any, directory: Path, keep: int) -> Any:
    policies = ocp.checkpoint_managers
    lowest = policies.BestN(
        get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(_STATE, ocp.args.PyTreeSave, _array_handler(ocp))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), lowest]),
        best_fn=_val_loss,  # without it no metrics are written
        cleanup_tmp_directories=True,  # what a killed save left behind
        enable_async_checkpointing=False,  # the worker thread is that already, and hides the import too
    )
    return ocp.CheckpointManager(directory, options=options, handler_registry=handlers)


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]
