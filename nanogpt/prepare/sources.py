"""What the user named: a hub data set, files, standard input or the bundled text, as numbered parts."""

import codecs
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, cast

import orjson

from nanogpt.errors import UserError
from nanogpt.prepare.bundled import SHAKESPEARE, TAIL_FRACTION
from nanogpt.prepare.config import Options
from nanogpt.prepare.manifest import SPLITS, file_name
from nanogpt.prepare.readers import (
    BLOCK_BYTES,
    DAMAGED,
    Lines,
    Part,
    Separated,
    Texts,
    Unreadable,
    damaged,
    open_stream,
    source_gone,
)

PART_BYTES = 8 << 20
"""Text in one part: the most that a killed run loses per worker, and a bound on memory."""
STANDARD_INPUT = "-"
HUB_SHORTHANDS = {
    # 80 parquet files, 8,013,769 documents
    "openwebtext": ("Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c"),
}
COMPRESSIONS = {".gz": 3.0, ".xz": 4.0, ".zst": 3.0}
"""Approximate bytes of text per byte of file, for the check of disk space and the time left."""
PARQUET_RATIO = 1.8
JSON_LINES, PARQUET, TEXT = "JSON lines", "parquet", "text"
PACKED = "packed files"
"""They may well hold texts, but are not read."""
SINGLE_TEXT, HUB = "a single text", "a data set of the hub"
KINDS = {
    ".parquet": PARQUET,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON_LINES),
    ".txt": TEXT,
    **dict.fromkeys((".7z", ".bz2", ".gzip", ".lz4", ".lzma", ".tar", ".tgz", ".z", ".zip", ".zstd"), PACKED),
}
NEEDS = {
    "limit": ("documents", {JSON_LINES, PARQUET, TEXT, HUB}),
    "split_seed": ("documents", {JSON_LINES, PARQUET, TEXT, HUB}),
    "text_column": ("rows with columns or fields", {JSON_LINES, PARQUET, HUB}),
    "separator": ("text files or text piped in", {TEXT}),
    **dict.fromkeys(("revision", "config", "split", "cached"), (HUB, {HUB})),
}
"""What a flag is about, and the kinds of sources that have it; for others the flag would do nothing."""


@dataclass(frozen=True)
class Shard:
    """One part, its place in the source, and its share of the source's bytes."""

    index: int
    source_bytes: int
    part: Part


@dataclass(frozen=True, kw_only=True)
class Source:
    name: str
    kind: str
    """JSON_LINES, PARQUET, TEXT for texts that are documents, SINGLE_TEXT or HUB."""
    revision: str | None = None
    source_bytes: int | None
    """Size of all files as they are stored; None if unknown."""
    text_bytes: int | None
    """Approximate size of the text in them."""
    identity: Any
    """JSON that changes when the content does, as far as sizes and times tell; None for a stream."""
    repeatable: bool = True
    """Whether `shards` may be called again: a stream that is not in memory continues where it stopped."""
    tail: float | None = None
    """The fraction at the end of a single text that validates; None if documents are drawn."""
    left_out: str = ""
    """How many files of which other kinds are in a folder."""
    parts: Callable[[], Iterator[tuple[Part, int]]]

    def shards(self) -> Iterator[Shard]:
        """The parts in order; if `repeatable`, each call gives the same ones.

        Raises UserError if the source goes away.
        """
        try:
            for index, (part, source_bytes) in enumerate(self.parts()):
                yield Shard(index, source_bytes, part)
        except OSError as error:
            raise source_gone(error) from error


def find_source(name: str, options: Options) -> Source:
    """The source called `name`. Raises UserError if there is none or its files cannot be used."""
    if options.separator is not None and not re.fullmatch(r"[^\r\n\ud800-\udfff]+", options.separator):
        raise UserError(
            f"got --separator {options.separator!r}, expected one line of UTF-8 that is not empty; "
            "choose one, or leave the flag out for a document a file"
        )
    try:
        return source_named(name, options)
    except OSError as error:
        raise source_gone(error) from error


def source_named(name: str, options: Options) -> Source:
    if name == SHAKESPEARE:
        path = str(resources.files("nanogpt").joinpath("assets/shakespeare.txt"))
        return replace(single_text(path, None, options, TAIL_FRACTION), name=name, identity=SHAKESPEARE)
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise UserError("standard input is closed, expected text or JSON lines; pipe them in")
        return standard_input(cast(BufferedReader, sys.stdin.buffer), options)
    if name not in HUB_SHORTHANDS and Path(name).exists():
        if not (Path(name).is_file() or Path(name).is_dir()):
            raise UserError(
                f"{name} is a pipe or a device, expected a file or a folder; "
                f"pipe it in and name {STANDARD_INPUT}"
            )
        return local_source(name, options)
    if name in HUB_SHORTHANDS or re.fullmatch(r"[\w-]+/[\w.-]+", name):
        return hub_source(name, options)
    raise UserError(
        f"there is no file, folder or data set {name!r}, expected a path, owner/name on the hub, "
        f"{', '.join(HUB_SHORTHANDS)}, {SHAKESPEARE} or {STANDARD_INPUT} for standard input; "
        "check the spelling"
    )


def hub_source(name: str, options: Options) -> Source:
    from nanogpt.prepare import hub

    full_name, pinned = HUB_SHORTHANDS.get(name, (name, None))
    revision = options.revision or pinned
    files = hub.find_files(full_name, revision=revision, config=options.config, split=options.split)

    return Source(
        name=full_name,
        kind=HUB,
        revision=files.revision,
        source_bytes=sum(files.sizes),
        text_bytes=int(PARQUET_RATIO * sum(files.sizes)),
        identity=[full_name, files.revision, options.config, options.split],
        parts=lambda: parquet_parts(files.names, cached=options.cached),
    )


def parquet_parts(names: Iterable[str], *, cached: bool) -> Iterator[tuple[Part, int]]:
    """Parts of all these files, on this machine or on the hub."""
    from nanogpt.prepare import arrow

    for name in names:
        yield from arrow.row_parts(name, PART_BYTES, cached)


def local_source(name: str, options: Options) -> Source:
    """A file, or a folder of files of one kind, in the order of their paths."""
    root = Path(name)
    paths, others = sources_below(root) if root.is_dir() else ([root], "")
    kind = common_kind(name, paths)
    if kind == TEXT and len(paths) == 1 and options.separator is None:
        if kind_of(paths[0]) is None and begins_with_json(paths[0]):
            raise UserError(
                f"{name} begins with a JSON object, expected a text; give it a name that ends in .jsonl "
                "for a document a line, or in .txt"
            )
        return replace(single_text(str(paths[0]), None, options, TAIL_FRACTION, name), left_out=others)
    sizes = {path: path.stat().st_size for path in paths}
    return Source(
        name=name,
        kind=kind,
        source_bytes=sum(sizes.values()),
        text_bytes=int(sum(text_ratio(path) * size for path, size in sizes.items())),
        identity=[file_identity(path) for path in paths],
        left_out=others,
        parts=lambda: local_parts(paths, kind, options),
    )


def common_kind(name: str, paths: list[Path]) -> str:
    """The kind of these files. Raises UserError if there are several, or none, or two copies of a file."""
    read: dict[Path, Path] = {}
    for path in paths:
        if kind_of(path) == PACKED:
            raise UserError(
                f"{path} is packed in a way that is not read, expected .gz, .xz or .zst of .jsonl or .txt; "
                "unpack it"
            )
        other = read.setdefault(uncompressed(path), path)
        if other is not path:
            raise UserError(
                f"{path.parent} holds {other.name} and {path.name}, expected one of them; remove the other"
            )
    kinds = {kind_of(path) or TEXT for path in paths}
    if len(kinds) != 1:
        found = " and ".join(sorted(kinds)) or "no file of these"
        raise UserError(
            f"{name} holds {found}, expected files of one kind: .parquet, .jsonl or .txt, the last two also "
            "as .gz, .xz or .zst; name a file, or a folder of one kind"
        )
    return kinds.pop()


def sources_below(folder: Path) -> tuple[list[Path], str]:
    """(files in `folder` that may hold texts, in the order of their paths; which others there are).

    Except what `prepare` wrote, so that `--out` may be inside `folder`.
    """
    written = {"manifest.json", *map(file_name, SPLITS)}
    paths = [
        path
        for path in files_below(folder, os.path.realpath(folder), {})
        if not (path.name in written and path.with_name(file_name("train")).exists())
    ]
    others = Counter(ending(path) or path.name for path in paths if kind_of(path) is None)
    counts = [f"{count:,} {end}" for end, count in sorted(others.items())]
    found = ", ".join([*counts[:9], "..."] if counts[9:] else counts)
    return [path for path in paths if kind_of(path) is not None], found


def files_below(path: Path, real: str, seen: dict[str, Path]) -> Iterator[Path]:
    """The file `path`, or the files in that folder and all folders in it, by their paths; not hidden ones.

    Links are followed; `real` is `path` without them, and `seen` has what was found before, by such paths.
    Raises UserError for texts that are found twice, as if links go round, and for what is no file or folder;
    OSError for a folder that cannot be read.
    """
    first = seen.setdefault(real, path)
    if first is not path and (path.is_dir() or kind_of(path) is not None):
        raise UserError(f"{path} is {first} once more, by a link, expected it once; remove the link")
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                inner_real = os.path.realpath(inner) if inner.is_symlink() else os.path.join(real, inner.name)
                yield from files_below(inner, inner_real, seen)
    elif path.is_file():
        yield path
    else:
        raise UserError(
            f"{path} is a link to nothing, a pipe or a device, expected a file or a folder; remove it, "
            "or bring back what it links to"
        )


def local_parts(paths: list[Path], kind: str, options: Options) -> Iterator[tuple[Part, int]]:
    if kind == PARQUET:
        yield from parquet_parts(map(str, paths), cached=False)
    elif kind == JSON_LINES:
        for path in paths:
            yield from file_blocks(path, None) if ending(path) in COMPRESSIONS else json_ranges(path)
    elif options.separator is not None:
        for path in paths:
            yield from file_blocks(path, options.separator)
    else:
        yield from whole_texts(paths)


def begins_with_json(path: Path) -> bool:
    """Whether the first line of the file is a JSON object."""
    try:
        with path.open("rb") as raw, open_stream(raw, path.suffix) as stream:
            return isinstance(orjson.loads(without_blanks(stream.readline())), dict)
    except (ValueError, *DAMAGED):
        return False


def single_text(
    path: str, data: bytes | None, options: Options, tail: float, name: str | None = None
) -> Source:
    """A text that is not divided into documents: its last `val_fraction`, by default `tail`, validates."""
    fraction = tail if options.val_fraction is None else options.val_fraction
    size = Path(path).stat().st_size if data is None else len(data)
    part = Texts((path,), data, fraction or None)
    return Source(
        name=name or path,
        kind=SINGLE_TEXT,
        source_bytes=size,
        text_bytes=int(size * text_ratio(Path(path))),
        identity=file_identity(Path(path)) if data is None else None,
        tail=fraction,
        parts=lambda: iter([(part, size)]),
    )


def standard_input(stream: BufferedReader, options: Options) -> Source:
    """Texts if there is a separator, else JSON lines if the first character is `{`, else a single text."""
    name = "standard input"
    if options.separator is not None:
        kind, blocks = TEXT, stream_blocks(stream, name, options.separator)
    elif without_blanks(beginning := beginning_of(stream)).startswith(b"{"):
        kind, blocks = JSON_LINES, stream_blocks(stream, name, None, beginning)
    else:
        return single_text(name, beginning + stream.read(), options, TAIL_FRACTION)
    return Source(
        name=name,
        kind=kind,
        source_bytes=None,
        text_bytes=None,
        identity=None,
        repeatable=False,
        parts=lambda: ((part, 0) for part in blocks),
    )


def beginning_of(stream: BufferedReader) -> bytes:
    """The next bytes of `stream` up to one that is not blank, or more: a pipe may give one at a time."""
    data = b""
    while codecs.BOM_UTF8.startswith(data) or not without_blanks(data):
        if not (piece := stream.read1(BLOCK_BYTES)):
            break
        data += piece
    return data


def without_blanks(data: bytes) -> bytes:
    """`data` without a byte order mark and blanks at its start."""
    return data.removeprefix(codecs.BOM_UTF8).lstrip()


def json_ranges(path: Path) -> Iterator[tuple[Part, int]]:
    """Ranges of bytes that end with a line: each worker reads its own, and nothing is read twice."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            file.seek(start + PART_BYTES)
            file.readline()
            stop = min(file.tell(), size)
            yield Lines(str(path), start, stop), stop - start
            start = stop


def file_blocks(path: Path, separator: str | None) -> Iterator[tuple[Part, int]]:
    """Blocks of a file that has to be read from its start, each with the bytes of the file that it took."""
    before = 0
    try:
        with path.open("rb") as raw, open_stream(raw, path.suffix) as stream:
            for part in stream_blocks(stream, str(path), separator):
                yield part, raw.tell() - before
                before = raw.tell()
    except DAMAGED as error:  # when it is opened
        yield Unreadable(damaged(str(path), error)), 0


def stream_blocks(
    stream: BufferedIOBase, name: str, separator: str | None, data: bytes = b""
) -> Iterator[Part]:
    """Blocks that end with a document: JSON lines, or text with a line `separator` between documents.

    They begin with `data`, which has been read already. A damaged stream gives the complete documents before
    the damage, and then an `Unreadable`.
    """
    first_line, wanted, ended, damage = 1, PART_BYTES, False, None
    while not ended or data:
        if not ended:
            data, ended, damage = filled(stream, data, wanted)
        last = ended and len(data) <= wanted
        end = len(data) if last and damage is None else documents_end(data, wanted, separator)
        if end:
            yield stream_part(name, data[:end], separator, first_line)
        first_line += data.count(b"\n", 0, end)
        if last:
            break
        data = data[end:]
        wanted = PART_BYTES if end else 2 * wanted  # else a long document is searched again for each piece
    if damage is not None:
        yield Unreadable(damaged(f"{name} from line {first_line:,} on", damage))


def filled(stream: BufferedIOBase, data: bytes, size: int) -> tuple[bytes, bool, Exception | None]:
    """`data` extended to at least `size` bytes; whether the stream ended before that; and by what damage."""
    pieces, damage = [data], None
    have = len(data)
    while have < size:
        try:
            piece = stream.read1(BLOCK_BYTES)
        except DAMAGED as error:
            piece, damage = b"", error
        if not piece:
            return b"".join(pieces), True, damage
        pieces.append(piece)
        have += len(piece)
    return b"".join(pieces), False, None


def documents_end(data: bytes, size: int, separator: str | None) -> int:
    """Where the last complete document in the first `size` bytes ends, with its separator; 0 without one.

    This way the parts do not depend on the pieces in which a stream happens to arrive.
    """
    ends = [b""] if separator is None else [separator.encode() + end for end in (b"\n", b"\r\n")]
    found = [(data.rfind(b"\n" + end, 0, size), 1 + len(end)) for end in ends]
    return max(place + length if place >= 0 else 0 for place, length in found)


def stream_part(name: str, data: bytes, separator: str | None, first_line: int) -> Part:
    if separator is None:
        return Lines(name, data=data, first_line=first_line)
    return Separated(name, data, separator.encode(), first_line)


def whole_texts(paths: list[Path]) -> Iterator[tuple[Part, int]]:
    """Files in groups of about a part's size."""
    names: list[str] = []
    size = 0
    for path in paths:
        names.append(str(path))
        size += path.stat().st_size
        if size >= PART_BYTES:
            yield Texts(tuple(names)), size
            names, size = [], 0
    if names:
        yield Texts(tuple(names)), size


def kind_of(path: Path) -> str | None:
    """The kind that the name implies, without a compression's ending; None for other files."""
    plain = uncompressed(path)
    kind = KINDS.get(ending(plain))
    return PACKED if kind == PARQUET and plain != path else kind


def uncompressed(path: Path) -> Path:
    """`path` without a compression's ending."""
    return path.with_suffix("") if ending(path) in COMPRESSIONS else path


def text_ratio(path: Path) -> float:
    """Approximate bytes of text per byte of the file."""
    return PARQUET_RATIO if kind_of(path) == PARQUET else COMPRESSIONS.get(ending(path), 1.0)


def ending(path: Path) -> str:
    """The end of the name, in small letters, as in `.gz`."""
    return path.suffix.lower()


def file_identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
