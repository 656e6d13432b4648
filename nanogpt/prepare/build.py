"""All of `prepare`: find the source, make its shards, draw the validation documents, write the folder."""

import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import __version__, folders
from nanogpt.cores import usable_cores
from nanogpt.errors import UserError
from nanogpt.prepare.config import SPLIT_FRACTION, Options, PrepareConfig, choose_engine
from nanogpt.prepare.engines import EnginesDifferError
from nanogpt.prepare.journal import (
    FOLDER_NAME,
    Journal,
    content_hash,
    differences,
    open_journal,
    read_job,
)
from nanogpt.prepare.manifest import (
    MANIFEST_VERSION,
    SPLITS,
    Manifest,
    file_name,
    has_expected_sizes,
    read_manifest,
    write_manifest,
)
from nanogpt.prepare.progress import Progress
from nanogpt.prepare.readers import Bad
from nanogpt.prepare.shards import Job, Record, encode_all, read_shard, readable
from nanogpt.prepare.sources import NEEDS, Source, find_source
from nanogpt.tokenizer import Tokenizer, characters, gpt2, without_surrogates
from nanogpt.units import format_bytes

BYTES_PER_TOKEN = {"gpt2": 4.0, "char": 1.0}
"""Of English text, for the check of disk space."""


def prepare(config: PrepareConfig) -> Manifest:
    """Write `train.bin`, `val.bin` and `manifest.json` to `config.out`, unless they are already there.

    The bytes depend on the source, the tokenizer and the settings in the manifest; not on the number of
    workers, the engine, or how often the run was interrupted. Raises UserError for every mistake of the user.
    """
    try:
        return prepare_files(config)
    except OSError as error:
        raise UserError(
            f"cannot write to {config.out} ({error.strerror}), expected room and permission there; "
            "make some, or choose another --out"
        ) from error


def prepare_files(config: PrepareConfig) -> Manifest:
    """The same, but an OSError means that the output failed: whatever reads the source raises UserError."""
    source = find_source(config.source, with_known_revision(config))
    check_flags(config, source)
    settings = settings_of(config, source)
    if finished := finished_manifest(config, source, settings):
        return finished
    check_disk(config, source)
    if source.left_out:
        sys.stderr.write(f"left out of {source.name}: {source.left_out}, expected .parquet, .jsonl or .txt\n")
    tokenizer = gpt2() if config.tokenizer == "gpt2" else characters_of(source, config)
    config.out.mkdir(parents=True, exist_ok=True)
    with open_journal(
        config.out,
        job_settings(source, tokenizer, settings),
        engine=choose_engine(config.engine, tokenizer.name),
        restartable=source.identity is not None,
        usable=lambda record: config.skip_bad or not record.skipped,
    ) as journal:
        if finished := finished_manifest(config, source, settings):  # by another process meanwhile
            return finished
        records = encode(config, source, tokenizer, journal)
        if has_new_files(source, config):
            journal.start_anew(journal.engine)  # or whoever brings the old files back gets shards of the new
            raise UserError(
                f"{source.name} has changed while it was read, expected it to stay as it was; run the same "
                "command again once nothing changes it"
            )
        documents = min(sum(record.documents for record in records), config.limit or sys.maxsize)
        if documents == 0:
            raise UserError(
                f"{source.name} has no documents{in_brackets(skipped_in(records))}, expected at least one to "
                "train on; name another source"
            )
        validates = validation_mask(documents, fraction=settings["val_fraction"], seed=settings["split_seed"])
        files = assemble(records, validates, journal.folder, config.out)
        manifest = manifest_of(source, tokenizer, settings, records, files)
        for stale in config.out.glob(".manifest.json.*"):
            stale.unlink()  # left by a process that was killed while writing
        write_manifest(config.out, manifest)
    return manifest


def check_flags(config: PrepareConfig, source: Source) -> None:
    """Raises UserError for a flag that is set but means nothing for `source`."""
    usual = PrepareConfig(source=config.source, out=config.out)
    values, defaults = ({**vars(each), **vars(each.options)} for each in (config, usual))
    for name, (needed, kinds) in NEEDS.items():
        if values[name] != defaults[name] and source.kind not in kinds:
            raise UserError(
                f"got --{name.replace('_', '-')} for {source.name}, {source.kind}, expected {needed}; "
                "leave it out"
            )


def has_new_files(source: Source, config: PrepareConfig) -> bool:
    """Whether the files of `source` are others now; a revision of the hub and what is piped in stay."""
    is_local = source.revision is None and source.identity is not None
    return is_local and find_source(config.source, config.options).identity != source.identity


def job_settings(source: Source, tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """What the shards depend on: a run can only continue the shards of an equal job.

    Which documents validate is decided later, except for a single text; and a finished shard without bad
    documents is the same with or without `--skip-bad`.
    """
    free = {"source_bytes", "skip_bad"} | (
        set() if source.tail is not None else {"val_fraction", "split_seed"}
    )
    job = {"source": source.name, "revision": source.revision, "tokenizer": tokenizer.describe()}
    job |= {key: value for key, value in settings.items() if key not in free}
    return job | {"content": content_hash(source.identity), "program": __version__}


def in_brackets(skipped: dict[str, int]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    return f" (left out: {counts})" if skipped else ""


def with_known_revision(config: PrepareConfig) -> Options:
    """The options; if they name no revision, with the commit that an earlier call in this folder found."""
    if config.options.revision is not None:
        return config.options
    job = read_job(config.out)
    if job is not None:
        source, revision = job["settings"]["source"], job["settings"]["revision"]
    elif (config.out / "manifest.json").is_file():
        manifest = read_manifest(config.out)
        source, revision = manifest.source, manifest.revision
    else:
        return config.options
    return replace(config.options, revision=revision if source == config.source else None)


def settings_of(config: PrepareConfig, source: Source) -> dict[str, Any]:
    """What the bytes depend on besides source and tokenizer."""
    fraction = SPLIT_FRACTION if config.options.val_fraction is None else config.options.val_fraction
    return {
        "val_fraction": fraction if source.tail is None else source.tail,
        "split": "seeded" if source.tail is None else "tail",
        "split_seed": config.split_seed if source.tail is None else None,
        "text_column": config.text_column,
        "config": config.options.config,
        "hub_split": config.options.split,
        "separator": config.options.separator,
        "limit": config.limit,
        "skip_bad": config.skip_bad,
        "source_bytes": source.source_bytes,
    }


def finished_manifest(config: PrepareConfig, source: Source, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of an earlier call with the same settings; None if the folder is free.

    Raises UserError if other data is there, because nothing is ever overwritten.
    """
    held = [name for name in ("manifest.json", *map(file_name, SPLITS)) if (config.out / name).exists()]
    unfinished = read_job(config.out) is not None
    if not held or (unfinished and "manifest.json" not in held):
        return None
    why = "no manifest.json says of what"
    if "manifest.json" in held:
        manifest = read_manifest(config.out)
        have = {
            "source": manifest.source,
            "revision": manifest.revision,
            "tokenizer": manifest.tokenizer["name"],
        }
        want = {"source": source.name, "revision": source.revision, "tokenizer": config.tokenizer}
        why = differences(have | manifest.settings, want | settings)
        if not why and source.identity is None:
            why = "what is piped in may be other text"
        elif not why and not has_expected_sizes(config.out, manifest):
            why = "the token files have other sizes than manifest.json says"
        if not why:
            shutil.rmtree(config.out / FOLDER_NAME, ignore_errors=True)
            return manifest
    raise UserError(
        f"{config.out} already holds {', '.join(held)} of other data or settings ({why}), expected a free "
        "folder; choose another --out, or delete them first"
    )


def check_disk(config: PrepareConfig, source: Source) -> None:
    """Raises UserError if `config.out` cannot be written, or what is made there would not fit."""
    existing = folders.nearest(config.out)
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"cannot write to {existing}, expected a folder of yours; choose another --out")
    if source.text_bytes is None or config.limit is not None:
        return
    needed = 2 * 2 * source.text_bytes / BYTES_PER_TOKEN[config.tokenizer]  # both are there together
    free = shutil.disk_usage(existing).free + folder_bytes(config.out / FOLDER_NAME)
    if free < needed:
        raise UserError(
            f"{existing} has {format_bytes(free)} free, expected about {format_bytes(needed)}, of which half "
            "is needed only while it works; free some, set --limit, or choose another --out"
        )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.shard"))


def characters_of(source: Source, config: PrepareConfig) -> Tokenizer:
    """A tokenizer of the characters of all documents: one more pass over the source, in this process."""
    if source.identity is None:
        raise UserError(
            "got --tokenizer char for standard input, which can be read only once, expected a file; "
            "save it and name the file"
        )
    alphabet: set[str] = set()
    documents = chain.from_iterable(readable(shard.part, config.text_column) for shard in source.shards())
    for document in islice((d for d in documents if not isinstance(d, Bad)), config.limit):
        alphabet.update(without_surrogates(document))  # else halves of two documents might become a pair
    return characters("".join(alphabet))


def encode(config: PrepareConfig, source: Source, tokenizer: Tokenizer, journal: Journal) -> list[Record]:
    """Records of all shards that are needed, in order; makes and notes those that the journal lacks."""
    job = Job(
        folder=str(journal.folder),
        tokenizer=json.dumps(tokenizer.describe()),
        engine=journal.engine,
        column=config.text_column,
        skip_bad=config.skip_bad,
        limit=config.limit,
    )
    try:
        return encode_with(job, config, source, journal)
    except EnginesDifferError as error:
        what = f"{journal.engine} disagrees with tiktoken on this input ({error})"
        if not source.repeatable:
            raise UserError(
                f"{what}, expected the same ids, and {source.name} cannot be read a second time; "
                "pipe it in again with --engine tiktoken, which is slower"
            ) from error
        sys.stderr.write(f"warning: {what}; everything is done again with tiktoken, which is slower\n")
        journal.start_anew("tiktoken")
        return encode_with(replace(job, engine="tiktoken"), config, source, journal)


def encode_with(job: Job, config: PrepareConfig, source: Source, journal: Journal) -> list[Record]:
    """The same, with one engine. Raises UserError at the first bad document that is needed."""
    progress = Progress(source.source_bytes, engine=job.engine, kept=journal.records)
    workers = config.workers or usable_cores()
    records: list[Record] = []
    documents = 0
    for record in encode_all(source.shards(), job, workers, dict(journal.records)):
        records.append(record)
        documents += record.documents
        progress.add(record)
        enough = config.limit is not None and documents >= config.limit
        if record.bad is not None and not enough:
            progress.finish()
            raise UserError(f"{record.bad}; mend the source, or leave such documents out with --skip-bad")
        if record.index not in journal.records:
            journal.add(record)
        if enough:
            break
    progress.finish()
    return records


def assemble(records: list[Record], validates: np.ndarray, folder: Path, out: Path) -> "dict[str, TokenFile]":
    """Makes the token files in `out` from the shards in `folder`; val.bin gets the documents in `validates`.

    Documents keep the order of the source; the last shard may hold more of them than `validates` covers. Each
    file gets its name by rename, once it is complete.
    """
    start = 0
    with ThreadPoolExecutor(2 * len(SPLITS)) as helpers:  # a hash and a flush for each file
        files = {split: TokenFile(folder / f"{file_name(split)}.partial", helpers) for split in SPLITS}
        for record in records:
            ids, lengths = read_shard(folder, record)
            chosen = validates[start : start + record.documents]
            start += chosen.size
            lengths = lengths[: chosen.size]
            ids = ids[: lengths.sum()]
            files["train"].append(ids_where(ids, lengths, ~chosen), int((~chosen).sum()))
            if chosen.any():
                files["val"].append(ids_where(ids, lengths, chosen), int(chosen.sum()))
        for split, file in files.items():
            file.move_to(out / file_name(split))
    return files


def ids_where(ids: np.ndarray, lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The ids of the `wanted` documents, copied run by run; `ids` itself if all are wanted."""
    if wanted.all():
        return ids
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))  # starts and ends of runs, in turn
    starts_and_ends = np.append(0, np.cumsum(lengths, dtype=np.int64))[edges].reshape(-1, 2)
    return np.concatenate([ids[:0], *(ids[start:end] for start, end in starts_and_ends)])


class TokenFile:
    """A token file being written, with what the manifest says about it; `helpers` hash and flush it."""

    def __init__(self, path: Path, helpers: ThreadPoolExecutor) -> None:
        self._path = path
        self._file = path.open("wb")
        self._helpers = helpers
        self._digest = hashlib.sha256()
        self._sent: Future[None] | None = None
        self.documents = self.tokens = self.max_token_id = 0

    def append(self, ids: np.ndarray, documents: int) -> None:
        hashed = self._helpers.submit(self._digest.update, ids.data)
        self._file.write(ids.data)
        if self._sent is None or self._sent.done():
            self._check_sent()
            sync = getattr(os, "fdatasync", os.fsync)  # macOS only has the slower one
            self._sent = self._helpers.submit(sync, self._file.fileno())
        self.tokens += ids.size
        self.documents += documents
        self.max_token_id = max(self.max_token_id, int(ids.max(initial=0)))
        hashed.result()

    def _check_sent(self) -> None:
        """Raises the error of the last flush, if any: the system reports it only once."""
        if self._sent is not None:
            self._sent.result()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def move_to(self, path: Path) -> None:
        """Renames the file to `path`, once it is complete and on the disk."""
        self._file.flush()
        self._check_sent()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(path)


def validation_mask(documents: int, *, fraction: float, seed: int | None) -> np.ndarray:
    """Whether each document, in source order, validates; if `seed` is None, all but the first do.

    The draw is that of `train_test_split(test_size=fraction, seed=seed, shuffle=True)` of `datasets`: the
    first ceil(fraction x documents) of a permutation. Raises UserError if no document is left to train on.
    """
    mask = np.zeros(documents, bool)
    if seed is None:
        mask[1:] = True
    else:
        mask[np.random.default_rng(seed).permutation(documents)[: math.ceil(fraction * documents)]] = True
    if mask.all():
        raise UserError(
            f"got {documents} documents of which {mask.sum()} would validate, expected at least one "
            "to train on; name a source with more, or set --val-fraction 0 to hold out none"
        )
    return mask


def manifest_of(
    source: Source,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    records: list[Record],
    files: dict[str, TokenFile],
) -> Manifest:
    return Manifest(
        version=MANIFEST_VERSION,
        source=source.name,
        revision=source.revision,
        tokenizer=tokenizer.describe(),
        vocab_size=tokenizer.vocab_size,
        documents={split: file.documents for split, file in files.items()},
        tokens={split: file.tokens for split, file in files.items()},
        sha256={file_name(split): file.sha256 for split, file in files.items()},
        max_token_id=max(file.max_token_id for file in files.values()),
        skipped=skipped_in(records),
        settings=settings | {"program": __version__},
    )


def skipped_in(records: list[Record]) -> dict[str, int]:
    """Documents left out, by reason."""
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    return dict(sorted(skipped.items()))
