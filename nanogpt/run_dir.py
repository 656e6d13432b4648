"""A run directory: whether it belongs to this run, at which step the run resumes, and its config.json."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nanogpt
from nanogpt.checkpoint import Checkpointer
from nanogpt.config import RunConfig
from nanogpt.dataset import Dataset
from nanogpt.errors import UserError

CONFIG, METRICS, PICTURE = "config.json", "metrics.jsonl", "loss.png"
# What may change when a run resumes, as it affects neither its numbers nor which tokens it sees. None stands
# for a whole group.
FREE_TO_CHANGE = {
    "data": {"path", "batch_size"},
    "train": {"stop_after", "device", "compile", "attention"},
    "mesh": None,
    "eval": None,
    "checkpoint": None,
    "track": None,
    "sample": None,
    "init": None,
    "resume": None,
    "run_dir": None,
    "plan": None,
}


def starting_step(config: RunConfig, dataset: Dataset, checkpointer: Checkpointer) -> int:
    """The step of the checkpoint to resume from; 0 without one.

    Raises UserError if the directory is not this run's.
    """
    run_dir, latest = config.run_dir, checkpointer.latest()
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, expected a directory to write to; choose another --run-dir")
    known = read_about(run_dir)
    foreign = [name for name in (METRICS, PICTURE) if (run_dir / name).exists()]
    if known is None and latest is None and foreign:
        raise UserError(
            f"{run_dir} holds {foreign[0]} but no {CONFIG}, so it is not a run's directory; choose another "
            "--run-dir"
        )
    if config.resume == "never" and (latest is not None or known is not None):
        raise UserError(
            f"{run_dir} holds a run (at step {latest or 0}), expected none with --resume never; "
            f"choose another --run-dir or remove it"
        )
    if config.resume == "must" and latest is None:
        raise UserError(
            f"{run_dir} has no checkpoint, expected one with --resume must; check --run-dir or leave out "
            "--resume"
        )
    for about in (known, None if latest is None else checkpointer.metadata(latest)):
        if about is not None:
            check_same_run(about, config, dataset)
    return latest or 0


def read_about(run_dir: Path) -> dict[str, Any] | None:
    """What config.json says about the run; None if there is none. Raises UserError if it cannot be read."""
    path = run_dir / CONFIG
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text())
        if about["config"].keys() and about["data_hash"]:
            return about
        raise KeyError("config")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not what a run wrote ({type(error).__name__}: {error}); "
            f"move it away (each checkpoint holds the same) or choose another --run-dir"
        ) from error


def check_same_run(about: dict[str, Any], config: RunConfig, dataset: Dataset) -> None:
    """Raises UserError if `about` does not describe this run.

    It does not if the directory holds imported parameters rather than a run, if a setting that affects the
    run's numbers differs (the first one is named), or if the data differs.
    """
    if "imported" in about:
        raise UserError(
            f"{config.run_dir} holds parameters from {about['imported']}, expected a run's directory; choose "
            f"another --run-dir and start from them with --init.run-dir {config.run_dir}"
        )
    now = to_json(config)
    for group, values in now.items():
        free = FREE_TO_CHANGE.get(group, set())
        for name, new in values.items() if free is not None else ():
            before = about["config"].get(group)
            old = before.get(name) if isinstance(before, dict) else None
            # Without a flag, the device decides the precision, and the run keeps it.
            if (group, name) == ("train", "precision"):
                old = about.get("precision", old)
                new = new or old
            if name not in free and old != new:
                raise UserError(
                    f"{config.run_dir} holds a run with --{group}.{name.replace('_', '-')} {old}, now {new}; "
                    f"repeat its flags (they are in {CONFIG}) or choose another --run-dir"
                )
    was, now = about.get("data_sha256"), dataset.sha256  # None without a manifest, and in older runs
    if about["data_hash"] != dataset.hash or (was and now and was != now):
        raise UserError(
            f"{config.run_dir} was trained on other data than {dataset.folder} holds; choose another "
            f"--run-dir, or go on with the data that its {CONFIG} names"
        )


@contextlib.contextmanager
def own_run_dir(config: RunConfig, about: dict[str, Any]) -> Iterator[None]:
    """Holds the run directory for this process alone; creates it if need be and puts `about` in config.json.

    Raises UserError if another process holds it or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(config.run_dir, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            lock(descriptor, config.run_dir)
            part = config.run_dir / f"{CONFIG}.part"
            part.write_text(json.dumps(about, indent=2) + "\n")
            part.replace(config.run_dir / CONFIG)
        except OSError as error:
            raise UserError(
                f"cannot write to {config.run_dir} ({error.strerror}), expected a directory of yours with "
                f"room; choose another --run-dir"
            ) from error
        yield


def lock(descriptor: int, run_dir: Path) -> None:
    """Locks the open directory until it is closed or this process ends; UserError if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process trains in {run_dir}, expected one at a time; wait for it or choose another "
            f"--run-dir"
        ) from error
    except OSError:
        pass  # a file system without locks


def describe(config: RunConfig, dataset: Dataset, precision: str) -> dict[str, Any]:
    """What a reader of a run or a checkpoint must know: config, data, tokenizer, versions and commit."""
    return {
        "config": to_json(config),
        "precision": precision,
        "data": str(dataset.folder),
        "data_hash": dataset.hash,
        "data_sha256": dataset.sha256,
        "tokenizer": dataset.tokenizer.describe() if dataset.tokenizer else None,
        "versions": {
            "nanogpt": nanogpt.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "git_commit": git_commit(),
        },
        "command": sys.argv,
    }


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as it comes back from JSON: lists for tuples, strings for paths."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


@functools.cache
def git_commit() -> str | None:
    """The commit that this code is at, with a "+" if the tree has changes; None outside a repository."""
    # `describe --dirty` would write the index, and a process killed meanwhile would leave its lock behind.
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "status", "--branch"]
    command += ["--porcelain=v2", "--untracked-files=no"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    commit = re.match(r"# branch\.oid ([0-9a-f]+)$", said, re.MULTILINE)
    is_changed = re.search(r"^[^#]", said, re.MULTILINE)
    return commit and commit[1] + ("+" if is_changed else "")
