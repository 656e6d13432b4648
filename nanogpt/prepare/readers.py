"""The documents of one part of a source: a block of lines, rows of a parquet file, or whole text files.

A part is small, picklable, and the same to every process that reads it, so that any worker may have any part.
"""

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import DEFAULT_BUFFER_SIZE, BufferedIOBase, BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import orjson

from nanogpt.errors import UserError

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What the decompressors of the standard library raise for a file that is cut short or altered."""
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Bad:
    """Stands in for a document that cannot be used."""

    reason: str
    """What `--skip-bad` counts it as."""
    place: Callable[[], str]
    """Where it is; to find that out may mean reading all that comes before."""
    fault: str
    """What was found and what was expected."""

    @property
    def sentence(self) -> str:
        """What the user reads without `--skip-bad`."""
        return f"{self.place()} {self.fault}"


Document = str | Bad


@runtime_checkable
class Part(Protocol):
    def documents(self, column: str) -> Iterator[Document]:
        """The documents in order; `column` names the field of the text, if rows have fields."""
        ...


@dataclass(frozen=True)
class Lines:
    """JSON lines: bytes `start` to `stop` of a plain file, or `data` out of a stream."""

    name: str
    start: int = 0
    stop: int = 0
    data: bytes | None = None
    first_line: int | None = None
    """Number of the first line, from 1; None if finding it would mean reading all that comes before."""

    def documents(self, column: str) -> Iterator[Document]:
        for i, line in enumerate(BytesIO(self._read())):  # finds the ends faster than bytes.split
            if not line.isspace():
                yield quick_text(line, column) or json_text(line, column, partial(self._place, i))

    def _read(self) -> bytes:
        if self.data is not None:
            return self.data
        with Path(self.name).open("rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        if len(data) < self.stop - self.start:  # somebody writes the file anew
            raise OSError(f"{self.name} has become shorter")
        return data

    def _place(self, i: int) -> str:
        first = self.first_line
        if first is None:
            with Path(self.name).open("rb") as file:
                first = 1 + sum(block.count(b"\n") for block in blocks(file, self.start))
        return f"{self.name} line {first + i:,}"


@dataclass(frozen=True)
class Separated:
    """Text in which a line `separator` stands between documents, which end before the line end before it."""

    name: str
    data: bytes
    separator: bytes
    first_line: int

    def documents(self, column: str) -> Iterator[Document]:
        lines = self.data.removesuffix(b"\n").split(b"\n")
        ends = [i for i, line in enumerate(lines) if self._separates(line)] + [len(lines)]
        starts = [0] + [end + 1 for end in ends[:-1]]
        for start, end in zip(starts, ends, strict=True):
            raw = b"\n".join(lines[start:end]).removesuffix(b"\r")
            if end < len(lines) or raw.strip():
                yield decoded(raw, partial("{} line {:,}".format, self.name, self.first_line + start))

    def _separates(self, line: bytes) -> bool:
        return line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r") == self.separator


@dataclass(frozen=True)
class Texts:
    """Whole text files, or `data`, one document each; with a `tail`, that last fraction is a second one."""

    names: tuple[str, ...]
    data: bytes | None = None
    tail: float | None = None

    def documents(self, column: str) -> Iterator[Document]:
        for name in self.names:
            text = self._text(name)
            if self.tail is None or isinstance(text, Bad):
                yield text
            else:
                yield from head_and_tail(text, self.tail)

    def _text(self, name: str) -> Document:
        if self.data is not None:
            return decoded(self.data, partial(str, name))
        try:
            with Path(name).open("rb") as raw, open_stream(raw, Path(name).suffix) as file:
                return decoded(file.read(), partial(str, name))
        except DAMAGED as error:
            return damaged(name, error)


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a file, or the rest of one, that could not be read at all."""

    bad: Bad

    def documents(self, column: str) -> Iterator[Document]:
        yield self.bad


def quick_text(line: bytes, column: str) -> str | None:
    """The field `column` of a line that is as it should be; None if `json_text` has to find out what it is.

    orjson takes half the time of `json`, and rejects what `json` accepts beyond the standard.
    """
    try:
        text = orjson.loads(line)[column]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def json_text(line: bytes, column: str, place: Callable[[], str]) -> Document:
    """The field `column` of a line of JSON. `place()` says where the line is."""
    text = decoded(line.removesuffix(b"\n"), place)
    if isinstance(text, Bad):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Bad("broken JSON", place, f"is not JSON ({error}), expected one object a line")
    if not isinstance(row, dict):
        return Bad("broken JSON", place, f"holds {kind_name(row)}, expected one JSON object a line")
    if column not in row:
        return missing_column(place, list(row), column)
    return usable(row[column], place)


def decoded(raw: bytes, place: Callable[[], str]) -> Document:
    """UTF-8 as text, without a byte order mark."""
    try:
        return usable(raw.decode("utf-8-sig"), place)
    except UnicodeDecodeError as error:
        return undecodable(error, place)


def text_of(value: Any, place: Callable[[], str]) -> Document:
    """The text in a column's value; bytes are decoded as UTF-8."""
    if not isinstance(value, bytes):
        return usable(value, place)
    try:
        return usable(value.decode(), place)
    except UnicodeDecodeError as error:
        return undecodable(error, place)


def undecodable(error: UnicodeDecodeError, place: Callable[[], str]) -> Bad:
    at, byte = error.start, error.object[error.start]
    return Bad("undecodable bytes", place, f"has 0x{byte:02x} at byte {at:,}, expected UTF-8")


def usable(value: Any, place: Callable[[], str]) -> Document:
    """`value` if it is a text that is not empty, else what is wrong with it."""
    if not isinstance(value, str):
        return Bad("not a text", place, f"holds {kind_name(value)}, expected a text")
    return value or Bad("empty", place, "is an empty document, expected at least one character")


def kind_name(value: Any) -> str:
    """What JSON and parquet call a value of this kind."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def missing_column(place: Callable[[], str], columns: list[str], column: str) -> Bad:
    found = ", ".join(columns) or "no columns"
    return Bad("missing column", place, f"has {found}, expected {column!r} (set --text-column)")


def damaged(place: str, error: BaseException) -> Bad:
    return Bad(
        "damaged file", partial(str, place), f"is cut short or damaged ({error}), expected a complete file"
    )


def hub_unreachable(name: str, error: BaseException) -> UserError:
    return UserError(
        f"cannot read {name} ({first_line(error)}), expected a hub that answers; "
        "check the network and run the same command again: it continues where it was"
    )


def source_gone(error: OSError) -> UserError:
    return UserError(
        f"cannot read the source ({error}), expected it to stay where it is and readable; "
        "mend that and run the same command again: it continues where it was"
    )


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def head_and_tail(text: str, fraction: float) -> tuple[str, str]:
    """`text` cut so that the second piece has `fraction` of its characters, rounded down."""
    cut = len(text) - int(len(text) * fraction)
    return text[:cut], text[cut:]


def blocks(file: BufferedIOBase, size: int) -> Iterator[bytes]:
    """The first `size` bytes of `file` in pieces."""
    while size > 0 and (block := file.read(min(size, BLOCK_BYTES))):
        size -= len(block)
        yield block


def open_stream(raw: BufferedReader, suffix: str) -> BufferedIOBase:
    """A readable file of the uncompressed bytes of `raw`, whose name ends with `suffix`.

    Raises EOFError if a compressed file is empty.
    """
    match suffix.lower():
        case ".gz" | ".xz" | ".zst" if not raw.peek(1):
            raise EOFError("it has no bytes")
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return BufferedReader(XzStreams(raw))
        case ".zst":
            from nanogpt.prepare import arrow

            return arrow.open_zstandard(raw)
    return raw


class XzStreams(RawIOBase):
    """The uncompressed bytes of all streams in an xz file, which may have zeros after each.

    `lzma.open` takes whatever else it cannot read after the first stream for the end of the file.
    """

    def __init__(self, raw: BufferedIOBase) -> None:
        self._raw, self._stream = raw, lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._next_stream()
                if not packed:
                    break
                self._stream = lzma.LZMADecompressor()
            elif self._stream.needs_input:
                packed = self._raw.read(DEFAULT_BUFFER_SIZE)
                if not packed:
                    raise EOFError("it ends within a stream")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bytes:
        """What has been read beyond the last stream and its zeros; b"" at the end of the file."""
        data = self._stream.unused_data.lstrip(b"\0")
        while not data and (block := self._raw.read(DEFAULT_BUFFER_SIZE)):
            data = block.lstrip(b"\0")
        return data
