"""Worker processes turn the parts of a source into shards: one token file for each, in source order."""

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import Path

import numpy as np

from nanogpt.errors import UserError
from nanogpt.prepare.engines import Sample, check_sample, encoder, sample_of
from nanogpt.prepare.readers import Bad, Document, Part, source_gone
from nanogpt.prepare.sources import Shard
from nanogpt.prepare.workers import prepare_worker, start_server, without_ctrl_c
from nanogpt.tokenizer import Tokenizer, tokenizer_from

BATCH_CHARACTERS = 1 << 20
"""How much text is tokenized at once."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker has to know besides its part."""

    folder: str
    """Where shards are written."""
    tokenizer: str
    """`Tokenizer.describe()` as JSON."""
    engine: str
    column: str
    skip_bad: bool
    limit: int | None
    """Documents of the whole run, so no shard needs more."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What encoding a part resulted in."""

    index: int
    documents: int
    tokens: int
    """Including the end of text after each document."""
    text_bytes: int
    """Of the documents, in UTF-8."""
    source_bytes: int
    sha256: str
    """Of the shard's file: ids as uint16, then the number of ids of each document as uint32."""
    skipped: dict[str, int]
    bad: str | None = None
    """What is wrong with the document after the last one, where the shard ends."""


def shard_path(folder: str | Path, index: int) -> Path:
    return Path(folder) / f"{index:06d}.shard"


def encode_shard(shard: Shard, job: Job) -> tuple[Record, Sample | None]:
    """Write the shard, complete or not at all; returns a sample for tiktoken to check another engine's work.

    Raises UserError if the source or the disk fails.
    """
    path = shard_path(job.folder, shard.index)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        with partial.open("wb") as file:
            record, sample = write_shard(shard, job, file)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror}), expected room and permission there; make some and "
            "run the same command again: it continues where it was"
        ) from error
    return record, sample


def write_shard(shard: Shard, job: Job, file: BufferedIOBase) -> tuple[Record, Sample | None]:
    encode, end_of_text = (
        encoder(job.engine, job.tokenizer),
        tokenizer_from(json.loads(job.tokenizer)).end_of_text,
    )
    found: list[Bad] = []
    good = good_documents(readable(shard.part, job.column), job.skip_bad, found)
    digest = hashlib.sha256()
    lengths = [np.empty(0, "<u4")]
    text_bytes = tokens = 0
    pieces: list[str] = []
    for turn, texts in enumerate(batches(islice(good, job.limit)), shard.index):
        ids, sizes = encode(texts)
        if job.engine != "tiktoken":
            pieces += sample_of(texts, turn)
        if end_of_text is not None:
            ids, sizes = np.insert(ids, np.cumsum(sizes), end_of_text), sizes + 1
        text_bytes += len("".join(texts).encode("utf-8", "surrogatepass"))  # one call: texts may be short
        tokens += ids.size
        lengths.append(sizes.astype("<u4"))
        for_file = ids.astype("<u2", copy=False)
        digest.update(for_file.data)
        file.write(for_file.data)
    all_lengths = np.concatenate(lengths)
    digest.update(all_lengths.data)
    file.write(all_lengths.data)
    record = Record(
        index=shard.index,
        documents=all_lengths.size,
        tokens=tokens,
        text_bytes=text_bytes,
        source_bytes=shard.source_bytes,
        sha256=digest.hexdigest(),
        skipped=dict(Counter(bad.reason for bad in found)) if job.skip_bad else {},
        bad=found[0].sentence if found and not job.skip_bad else None,
    )
    return record, Sample(pieces, *encode(pieces)) if pieces else None


def read_shard(folder: str | Path, record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The ids and lengths that `write_shard` wrote, memory-mapped."""
    data = (
        np.memmap(shard_path(folder, record.index), np.uint8, "r") if record.tokens else np.empty(0, np.uint8)
    )
    return data[: 2 * record.tokens].view("<u2"), data[2 * record.tokens :].view("<u4")


def readable(part: Part, column: str) -> Iterator[Document]:
    """The documents of `part`. Raises UserError if the source goes away."""
    try:
        yield from part.documents(column)
    except OSError as error:
        raise source_gone(error) from error


def good_documents(documents: Iterable[Document], skip_bad: bool, found: list[Bad]) -> Iterator[str]:
    """The texts; bad documents go into `found`, the first of which ends the iteration unless `skip_bad`."""
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            found.append(document)
            if not skip_bad:
                return


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts, each list of about BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(shards: Iterable[Shard], job: Job, workers: int, done: dict[int, Record]) -> Iterator[Record]:
    """A record for each shard, in order, from `workers` processes; records in `done` are used as they are.

    When the caller stops early, processes that are still at work are ended. Raises UserError if a worker
    failed or died, and EnginesDifferError if one was wrong.
    """
    start_server(job.engine)
    others = set(multiprocessing.active_children())
    reference = tokenizer_from(json.loads(job.tokenizer))
    if job.engine != "tiktoken":
        reference.encode("")  # its tables are built while the server starts
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("forkserver"), initializer=prepare_worker
    )
    pending: deque[Record | Future[tuple[Record, Sample | None]]] = deque()
    try:
        for shard in shards:
            with without_ctrl_c():  # a worker just being started might miss the end, or be missed at it
                pending.append(done.get(shard.index) or pool.submit(encode_shard, shard, job))
            if len(pending) > 2 * workers:
                yield record_of(pending.popleft(), reference)
        while pending:
            yield record_of(pending.popleft(), reference)
    except (BrokenProcessPool, EOFError, OSError, MemoryError) as error:  # the middle two: while one starts
        raise UserError(
            "a worker process was killed, perhaps for want of memory, expected it to finish; "
            "run the same command again with fewer --workers: it continues where it was"
        ) from error
    finally:
        if pending:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def record_of(result: Record | Future[tuple[Record, Sample | None]], reference: Tokenizer) -> Record:
    """The record, once it is there and its sample is checked."""
    if isinstance(result, Record):
        return result
    record, sample = result.result()
    if sample is not None:
        check_sample(sample, reference)
    return record
