"""Orbax's share of checkpoints: array files, written whole or by several processes, and what is retained.

Importing this takes seconds (jax), so `checkpoint` does it when the first array is read or written.

The processes do not use `jax.distributed`: it can be started only once per process, makes a rank that reads
alone wait for the others, and aborts all when one dies. Instead each process writes its shards to a folder of
its own, in Orbax's per-process format; the one with the CheckpointManager moves these folders into the
checkpoint, where Orbax merges them. The result is an Orbax checkpoint like any other.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import future

from nanogpt.arrays import Arrays, Index, Part

STATE, METADATA, METRICS = "state", "metadata", "metrics"
_READS_AT_ONCE = 8
"""Bounds memory: to read a part of an array, all shards that overlap it are read whole."""
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
"""How zarr 3 stores a chunk. Without the checksum, which Orbax leaves out, a flipped bit is read as it is.
Orbax's compression would save a tenth of the space and take twice the time."""
_kinds = ocp.type_handlers


@dataclass(frozen=True)
class Staged:
    """A leaf whose shards the processes have written, with those of all other leaves, to `folders`."""

    folders: tuple[Path, ...]


@dataclass
class PartRestoreArgs(ocp.RestoreArgs):
    """Which part of an array to read."""

    index: Index = ()


class _Arrays(_kinds.NumpyHandler):
    """Numpy arrays with checksums, which can be read in part."""

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        async def write_all() -> None:
            await asyncio.gather(*(map(_write, values, infos)))

        return [future.CommitFutureAwaitingContractedSignals(write_all())]

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[np.ndarray]:
        assert args is not None
        slots = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(info: Any, index: Index) -> np.ndarray:
            async with slots:
                store = await _open_to_read(info)
                return await store[index].read()

        return list(
            await asyncio.gather(*(read(info, arg.index) for info, arg in zip(infos, args, strict=True)))
        )


class _StagedArrays(_kinds.NumpyHandler):
    """Moves what the processes have written into the checkpoint; readers see numpy arrays."""

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        return [future.CommitFutureAwaitingContractedSignals(self._take(values[0].folders, infos[0]))]

    async def _take(self, folders: Sequence[Path], info: Any) -> None:
        await info.await_path_creation()
        for folder in folders:
            folder.rename(Path(info.parent_dir) / folder.name)


def array_handler() -> Any:
    """Writes numpy arrays and moves in staged ones; reads these, and what jax wrote, whole or in part."""
    return ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        type_handler_registry=_kinds.create_type_handler_registry(
            (Staged, _StagedArrays()),
            (np.ndarray, _Arrays(deepcopy_host_arrays=False)),  # the caller has copied already
            (jax.Array, _kinds.ArrayHandler()),
        ),
    )


def open_manager(directory: Path, keep: int) -> Any:
    """Orbax's manager of the checkpoints in `directory`; removes what a killed save left behind."""
    policies = ocp.checkpoint_managers
    lowest = policies.BestN(
        get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(STATE, ocp.args.PyTreeSave, array_handler())
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), lowest]),
        best_fn=_val_loss,  # without it no metrics are written
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,  # the caller's thread does that, and hides the import too
    )
    return ocp.CheckpointManager(directory, options=options, handler_registry=handlers)


def save(
    manager: Any,
    step: int,
    state: dict[str, Any],
    metadata: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Write a checkpoint whose leaves are numpy arrays or Staged; returns once it has its final name."""
    items = {STATE: ocp.args.PyTreeSave(state), METADATA: ocp.args.JsonSave(metadata)}
    manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def describe(folder: Path) -> dict[str, Any]:
    """Something with `.shape` and `.dtype` for each array in `folder`, by name; reads no array."""
    return array_handler().metadata(folder).tree


def read(folder: Path, indices: dict[str, Index]) -> Arrays:
    """The named arrays in `folder`: of each the part at its index, or all of it if the index is empty."""
    wanted = ocp.args.PyTreeRestore(
        item=dict.fromkeys(indices, 0),
        restore_args={
            name: PartRestoreArgs(restore_type=np.ndarray, index=index) for name, index in indices.items()
        },
        partial_restore=True,
    )
    return array_handler().restore(folder, args=wanted)


def write_shards(folder: Path, process: int, shards: Arrays, parts: dict[str, Part]) -> list[Path]:
    """Write a process's `shards`, each at its place in the whole array; returns the folders it made."""
    context = _kinds.get_ts_context(use_ocdbt=True)

    def info(name: str) -> Any:
        return _kinds.ParamInfo(
            name=name,
            parent_dir=epath.Path(folder),
            use_zarr3=True,
            is_ocdbt_checkpoint=True,
            ts_context=context,
        )

    async def write_all() -> None:
        await asyncio.gather(
            *(_write(shard, info(name), parts[name], process) for name, shard in shards.items())
        )

    asyncio.run(write_all())
    return [made for made in folder.iterdir() if made.name == f"ocdbt.process_{process}"]


async def _write(array: np.ndarray, info: Any, part: Part | None = None, process: int = 0) -> None:
    """Write an array, or the part of one that a process holds, in chunks that each have a checksum."""
    await info.await_path_creation()
    part = part or Part(array.shape, array.shape, (), True)
    spec = _kinds.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=part.shape,
        local_shape=part.chunk,
        dtype=array.dtype,
        process_index=process,
    )
    spec["metadata"]["codecs"] = _CODECS
    store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
    await store[part.index].write(array, can_reference_source_data_indefinitely=True)


async def _open_to_read(info: Any) -> Any:
    await info.await_path_creation()
    spec = _kinds.get_json_tspec_read(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        raise_array_data_missing_error=info.raise_array_data_missing_error,
    )
    return await ts.open(ts.Spec(spec), open=True, context=info.ts_context)


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]
