"""What a run has finished, kept next to its output so that another with the same settings can continue."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from nanogpt.errors import UserError
from nanogpt.prepare.manifest import file_sha256, write_atomically
from nanogpt.prepare.shards import Record, shard_path

FOLDER_NAME = ".prepare"


@contextlib.contextmanager
def open_journal(
    out: Path,
    settings: dict[str, Any],
    *,
    engine: str,
    restartable: bool,
    usable: Callable[[Record], bool] = lambda record: True,
) -> "Iterator[Journal]":
    """The journal in `out`, continued if `restartable`, else new; no other process can open it meanwhile.

    Keeps those of an earlier process's shards that are `usable`. At the end removes the journal, unless the
    block raises and there are documents to continue with. Raises UserError if another process has the journal
    open, or if it has shards of a job with other `settings`.
    """
    folder = out / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if not has_locked(lock):
            raise UserError(
                f"{out} is being prepared by another process, expected one at a time; "
                "wait for it, or choose another --out"
            )
        job = read_job(out)
        journal = Journal(folder, settings, engine)
        if job is None or not restartable:
            journal.start_anew(engine)
        else:
            journal.resume(job, usable)
        is_finished = False
        try:
            yield journal
            is_finished = True
        finally:
            if is_finished or not (restartable and any(r.documents for r in journal.records.values())):
                shutil.rmtree(folder, ignore_errors=True)  # another process may be about to look at the lock


def has_locked(file: TextIO) -> bool:
    """Whether `file` is now locked until it is closed; False if another process has it, or has removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        sys.stderr.write(
            f"warning: {file.name} cannot be locked ({error.strerror}); see to it that nothing else prepares "
            "this folder meanwhile\n"
        )
        return True


class Journal:
    """The folder `.prepare` of an output folder: the job, and a line for each finished shard."""

    def __init__(self, folder: Path, settings: dict[str, Any], engine: str) -> None:
        self.folder, self.settings, self.engine = folder, settings, engine
        self.records: dict[int, Record] = {}

    def start_anew(self, engine: str) -> None:
        """Forget all shards; the next ones are made by `engine`."""
        self.engine = engine
        self.records = {}
        self._rewrite()
        write_atomically(
            self.folder / "job.json", json.dumps({"settings": self.settings, "engine": engine}).encode()
        )
        self._tidy()

    def add(self, record: Record) -> None:
        """Note a shard whose file is complete."""
        self.records[record.index] = record
        with (self.folder / "records.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def resume(self, job: dict[str, Any], usable: Callable[[Record], bool]) -> None:
        """Take over the usable shards whose files are as an earlier process left them.

        Starts anew, with a warning, if the source has changed since. Raises UserError for shards of another
        job.
        """
        kept = [record for record in read_records(self.folder / "records.jsonl") if self._is_whole(record)]
        old, new = job["settings"], self.settings
        if kept and old != new:
            if has_changed(old, new):
                sys.stderr.write("warning: the source has changed since this run began; all is done again\n")
            else:
                raise UserError(
                    f"{self.folder.parent} holds an unfinished run with other settings "
                    f"({differences(old, new)}), expected the same; repeat that command, delete "
                    f"{self.folder}, or choose another --out"
                )
        if old != new:
            self.start_anew(self.engine)
            return
        if job["engine"] == "tiktoken":  # perhaps because the faster one failed
            self.engine = "tiktoken"
        self.records = {record.index: record for record in kept if record.bad is None and usable(record)}
        self._rewrite()
        self._tidy()

    def _is_whole(self, record: Record) -> bool:
        path = shard_path(self.folder, record.index)
        return path.is_file() and file_sha256(path) == record.sha256

    def _tidy(self) -> None:
        """Remove what killed processes left half done, and shards without a record."""
        known = {shard_path(self.folder, index) for index in self.records}
        for path in set(self.folder.iterdir()) - known:
            if path.name not in ("job.json", "records.jsonl", "lock"):
                path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in self.records.values()]
        write_atomically(self.folder / "records.jsonl", "".join(lines).encode())


def read_job(out: Path) -> dict[str, Any] | None:
    """The settings and the engine of the unfinished run in `out`; None if there is none."""
    path = out / FOLDER_NAME / "job.json"
    try:
        job = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        job = None
    match job:
        case {"engine": str(), "settings": {"source": str(), "revision": str() | None}}:
            return job
    raise UserError(f"{path} is not what a run left, expected its settings; delete {path.parent}")


def read_records(path: Path) -> list[Record]:
    """The records of all whole lines: one may have been cut when the process or the machine stopped."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            records.append(Record(**json.loads(line)))
    return records


def has_changed(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two jobs read the same local source, whose content has changed in between."""
    same = old.get("source") == new["source"] and old.get("revision") is new["revision"] is None
    return same and old.get("content") != new["content"]


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ, with both values."""
    return "; ".join(
        f"{key} {old.get(key)!r}, now {value!r}" for key, value in new.items() if old.get(key) != value
    )


def content_hash(identity: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
