"""What a run has finished, kept next to its output so that another with the same settings continues."""

import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError
from nanogpt.prepare.manifest import file_sha256, write_atomically
from nanogpt.prepare.shards import Record, shard_path

FOLDER_NAME = ".prepare"


@contextmanager
def open_journal(
    out: Path, settings: dict[str, Any], *, engine: str, restartable: bool
) -> "Iterator[Journal]":
    """The journal in `out`, continued where `restartable`, else new; nobody else can open it meanwhile.

    Raises UserError where another process has it open or it belongs to a job with other `settings`.
    """
    folder = out / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{out} is being prepared by another process, expected one at a time; "
                "wait for it, or choose another --out"
            ) from error
        job = read_job(out)
        journal = Journal(folder, settings, engine)
        if job is None or not restartable:
            journal.start_anew(engine)
        else:
            journal.resume(job)
        yield journal


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
        for path in self.folder.glob("*.shard"):
            path.unlink()

    def add(self, record: Record) -> None:
        """Note a shard whose file is complete."""
        self.records[record.index] = record
        with (self.folder / "records.jsonl").open("a") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def remove(self) -> None:
        """The end: the folder is not needed any more."""
        shutil.rmtree(self.folder)

    def resume(self, job: dict[str, Any]) -> None:
        """Take over the shards that are as an earlier process left them; UserError for another job."""
        old, new = job["settings"], self.settings
        changed = [
            f"{key} {old.get(key)!r}, now {value!r}" for key, value in new.items() if old.get(key) != value
        ]
        if changed:
            raise UserError(
                f"{self.folder.parent} holds an unfinished run with other settings ({'; '.join(changed)}), "
                f"expected the same; repeat that command, delete {self.folder}, or choose another --out"
            )
        self.engine = job["engine"]
        for record in read_records(self.folder / "records.jsonl"):
            path = shard_path(self.folder, record.index)
            if path.is_file() and file_sha256(path) == record.sha256:
                self.records[record.index] = record
        self._rewrite()

    def _rewrite(self) -> None:
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in self.records.values()]
        write_atomically(self.folder / "records.jsonl", "".join(lines).encode())


def read_job(out: Path) -> dict[str, Any] | None:
    """The settings and the engine of the unfinished run in `out`; None where there is none."""
    try:
        return json.loads((out / FOLDER_NAME / "job.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_records(path: Path) -> list[Record]:
    """The records of complete lines: the last one may be cut where the process was killed."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [Record(**json.loads(line)) for line in lines]


def content_hash(identity: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
