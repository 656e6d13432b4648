"""A finished folder: does it hold what its manifest says, and what does it look like?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt.errors import UserError
from nanogpt.prepare.manifest import (
    SPLITS,
    Manifest,
    file_name,
    file_sha256,
    has_expected_sizes,
    read_manifest,
)
from nanogpt.tokenizer import Tokenizer, tokenizer_from

CHUNK_TOKENS = 1 << 22
PERCENTILES: tuple[int, ...] = (0, 5, 25, 50, 75, 95, 100)
SHOWN_TOKENS = 120


def verify(folder: Path) -> Manifest:
    """The manifest, once everything in it has been checked against the files.

    Raises UserError at the first thing that is wrong: the tokenizer, sizes, hashes, ids below the vocabulary
    size, the largest id, or an end of text for each document, the last of them at the end.
    """
    manifest = read_manifest(folder)
    tokenizer = tokenizer_of(folder, manifest)
    for split in SPLITS:
        path = folder / file_name(split)
        size = path.stat().st_size if path.is_file() else None
        expect(path, "bytes", size, 2 * manifest.tokens[split])
        expect(path, "the sha256", file_sha256(path), manifest.sha256[path.name])
    largest = 0
    for split in SPLITS:
        path = folder / file_name(split)
        ids = token_ids(path)
        largest = max([largest, *(int(chunk.max()) for chunk in chunks(ids))])
        require_known(path, largest, manifest)
        if tokenizer.end_of_text is not None and ids.size:
            ends = sum(int(np.count_nonzero(chunk == tokenizer.end_of_text)) for chunk in chunks(ids))
            expect(path, "ends of text", ends, manifest.documents[split])
            expect(path, "the last id", int(ids[-1]), tokenizer.end_of_text)
    expect(folder, "the largest id", largest, manifest.max_token_id)
    return manifest


REMEDY = "delete the folder and prepare the data again"


def tokenizer_of(folder: Path, manifest: Manifest) -> Tokenizer:
    """The manifest's tokenizer. Raises UserError unless its vocabulary is as large as the manifest says."""
    tokenizer = tokenizer_from(manifest.tokenizer)
    expect(folder, "a vocabulary", tokenizer.vocab_size, manifest.vocab_size)
    return tokenizer


def expect(path: Path, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise UserError(f"{path} has {what} {got}, expected {expected} as manifest.json says; {REMEDY}")


def require_known(path: Path, largest: int, manifest: Manifest) -> None:
    if largest >= manifest.vocab_size:
        raise UserError(f"{path} holds the id {largest}, expected ids below {manifest.vocab_size}; {REMEDY}")


@dataclass(frozen=True)
class Look:
    """A split in figures and a few documents."""

    documents: int
    tokens: int
    length_percentiles: dict[int, int]
    """Tokens of a document, its end included, by percentile; empty if no end of text marks documents."""
    samples: list[str]
    """The beginnings of some documents, spread over the split."""


def inspect(folder: Path, samples: int = 3) -> tuple[Manifest, dict[str, Look]]:
    """What is in `folder`.

    Raises UserError unless it is a prepared folder with the manifest's sizes and vocabulary, and if a
    document that is shown has ids beyond that.
    """
    manifest = read_manifest(folder)
    if not has_expected_sizes(folder, manifest):
        raise UserError(
            f"{folder} has files of other sizes than manifest.json says, expected those; {REMEDY}"
        )
    tokenizer = tokenizer_of(folder, manifest)
    looks = {s: look_at(folder / file_name(s), manifest, tokenizer, s, samples) for s in SPLITS}
    return manifest, looks


def look_at(path: Path, manifest: Manifest, tokenizer: Tokenizer, split: str, samples: int) -> Look:
    ids = token_ids(path)
    ends = np.array([ids.size] if ids.size else [], np.int64)
    if tokenizer.end_of_text is not None:
        found = [i + np.flatnonzero(c == tokenizer.end_of_text) for i, c in numbered_chunks(ids)]
        ends = 1 + np.concatenate([np.empty(0, np.int64), *found])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    percentiles: dict[int, int] = {}
    if tokenizer.end_of_text is not None and ends.size:
        values = np.percentile(ends - starts, PERCENTILES, method="nearest")
        percentiles = dict(zip(PERCENTILES, map(int, values), strict=True))
    shown = np.unique(np.linspace(0, ends.size - 1, samples).astype(int)) if ends.size else []
    beginnings = [ids[starts[i] : ends[i]][:SHOWN_TOKENS].tolist() for i in shown]
    require_known(path, max(map(max, beginnings), default=0), manifest)
    texts = [tokenizer.decode(beginning) for beginning in beginnings]
    return Look(manifest.documents[split], manifest.tokens[split], percentiles, texts)


def token_ids(path: Path) -> np.ndarray:
    """The ids of a token file, memory-mapped."""
    return np.memmap(path, "<u2", "r") if path.stat().st_size else np.empty(0, "<u2")


def chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (chunk for _, chunk in numbered_chunks(ids))


def numbered_chunks(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces that fit in memory, each with the index of its first id."""
    return ((start, ids[start : start + CHUNK_TOKENS]) for start in range(0, ids.size, CHUNK_TOKENS))
