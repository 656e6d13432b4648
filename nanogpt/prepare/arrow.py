"""Parquet and zstandard through pyarrow, imported only for sources of these kinds."""

import functools
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import pyarrow
import pyarrow.parquet as pq

from nanogpt.prepare.readers import (
    Bad,
    Document,
    Part,
    Unreadable,
    damaged,
    hub_unreachable,
    missing_column,
    text_of,
)

HUB = "hf://"
AWAY = (OSError, httpx2.HTTPError)
"""What is raised if the hub or the disk went away; of pyarrow also for bytes that do not decompress."""
READ_ERRORS = (pyarrow.ArrowException, EOFError, UnicodeDecodeError, *AWAY)
BATCH_ROWS = 64
"""Rows in memory at once: few, because a row may be a book; for pages also faster than 256 or 1,000."""
ZSTANDARD_BYTES = 1 << 16
"""Bytes asked of a zstandard file at once: where it is cut short, pyarrow gives all of them or none."""


@dataclass(frozen=True)
class Rows:
    """Row groups of a parquet file, on this machine or on the hub."""

    name: str
    groups: tuple[int, ...]
    first_row: int
    """Number of the first of these rows in the file, from 0."""
    cached: bool
    """Whether a file on the hub is downloaded as a whole before it is read."""

    def documents(self, column: str) -> Iterator[Document]:
        for row, value in enumerate(column_values(self, column), self.first_row):
            if (isinstance(value, str) and value) or isinstance(value, Bad):
                yield value
            else:
                yield text_of(value, partial("{} row {:,}".format, self.name, row))


def row_parts(name: str, part_bytes: int, cached: bool) -> Iterator[tuple[Part, int]]:
    """Parts of a parquet file, each about `part_bytes` of uncompressed rows, and their sizes in the file."""
    try:
        metadata = open_parquet(name, cached).metadata
    except READ_ERRORS as error:
        yield Unreadable(unreadable(name, error, name)), 0
        return
    groups: list[int] = []
    first_row = rows = uncompressed = compressed = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        groups.append(i)
        rows += group.num_rows
        uncompressed += group.total_byte_size
        compressed += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        if uncompressed >= part_bytes or i == metadata.num_row_groups - 1:
            yield Rows(name, tuple(groups), first_row, cached), compressed
            groups, first_row, rows, uncompressed, compressed = [], first_row + rows, 0, 0, 0


def column_values(part: Rows, column: str) -> Iterator[Any]:
    """The values of `column` in `part`; a `Bad` if the file has no such column or is damaged."""
    place, row = part.name, part.first_row
    try:
        file = open_parquet(part.name, part.cached)
        if column not in file.schema_arrow.names:
            rows = sum(file.metadata.row_group(group).num_rows for group in part.groups)
            yield from [missing_column(partial(str, part.name), file.schema_arrow.names, column)] * rows
            return
        for batch in file.iter_batches(BATCH_ROWS, list(part.groups), [column], use_threads=False):
            yield from python_values(batch.column(0))
            row += batch.num_rows
            place = f"{part.name} from row {row:,} on"
    except READ_ERRORS as error:
        yield unreadable(part.name, error, place)


def unreadable(name: str, error: BaseException, place: str) -> Bad:
    """What is wrong with the file. Raises if the file may be sound, but the hub or the disk went away."""
    if name.startswith(HUB) and isinstance(error, AWAY):
        raise hub_unreachable(name, error) from error
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return damaged(place, error)  # pyarrow's OSError without a number means bytes that do not decompress


def python_values(values: pyarrow.Array) -> list[Any]:
    """Python values; bytes instead of texts if one is not UTF-8, which pyarrow never checks."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return values.cast(pyarrow.large_binary()).to_pylist()
    except (OverflowError, ValueError, KeyError):  # dates that Python lacks are no texts in any case
        return list(values)


def open_parquet(name: str, cached: bool) -> pq.ParquetFile:
    """A file on this machine, or `hf://...` on the hub."""
    if name.startswith(HUB):
        return open_hub_parquet(name, cached)
    return pq.ParquetFile(pyarrow.OSFile(os.fsencode(name)))  # which takes no name for an address


@functools.lru_cache(maxsize=2)
def open_hub_parquet(name: str, cached: bool) -> pq.ParquetFile:
    """A file on the hub, kept open: asking the hub for it again takes longer than reading a part of it."""
    from nanogpt.prepare import hub

    return pq.ParquetFile(hub.open_file(name, cached), pre_buffer=True)


def open_zstandard(raw: io.BufferedIOBase) -> io.BufferedIOBase:
    """The uncompressed bytes of `raw`; damage raises EOFError, as in the standard library."""
    return io.BufferedReader(_Zstandard(raw))


class _Zstandard(io.RawIOBase):
    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._stream = pyarrow.CompressedInputStream(raw, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(min(len(buffer), ZSTANDARD_BYTES))
        except OSError as error:
            if error.errno is not None:
                raise
            raise EOFError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)
