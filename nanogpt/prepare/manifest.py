"""`manifest.json`: what a folder of token files holds, where it came from, and the hashes that prove it."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError

MANIFEST_VERSION = 1
SPLITS = ("train", "val")
READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The fields of `manifest.json`, in its order."""

    version: int
    source: str
    """What the user named: a hub name, a path, `-` for standard input, or the bundled text."""
    revision: str | None
    """Commit of a hub data set; None for everything else."""
    tokenizer: dict[str, Any]
    """`Tokenizer.describe()`: enough to build it again."""
    vocab_size: int
    documents: dict[str, int]
    """By split, as are the tokens."""
    tokens: dict[str, int]
    sha256: dict[str, str]
    """By file name."""
    max_token_id: int
    skipped: dict[str, int]
    """Documents left out under `--skip-bad`, by reason."""
    settings: dict[str, Any]
    """Everything else that the bytes depend on, and the program's version."""


def file_name(split: str) -> str:
    """`train.bin` or `val.bin`: raw little-endian uint16, as nanoGPT writes them."""
    return f"{split}.bin"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `folder/manifest.json`, complete or not at all."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
    write_atomically(folder / "manifest.json", text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises UserError if there is none or it is not one of ours."""
    path = folder / "manifest.json"
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} has no manifest.json, expected a folder that `python -m nanogpt.prepare` wrote; "
            "prepare the data or name another folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and prepare the data again") from error
    names = {field.name for field in dataclasses.fields(Manifest)}
    if not isinstance(fields, dict) or set(fields) != names or not has_expected_kinds(fields):
        raise UserError(
            f"{path} is not a manifest of version {MANIFEST_VERSION} with the fields "
            f"{', '.join(sorted(names))}; prepare the data again with this version"
        )
    return Manifest(**fields)


def has_expected_kinds(fields: dict[str, Any]) -> bool:
    """Whether the values of a manifest have the types that the rest of the program expects."""
    kinds = {"source": str, "revision": str | None, "vocab_size": int, "max_token_id": int, "settings": dict}
    counts = [fields[key] for key in ("documents", "tokens", "skipped")]
    return (
        fields["version"] == MANIFEST_VERSION
        and all(isinstance(fields[key], kind) for key, kind in kinds.items())
        and all(isinstance(d, dict) and all(isinstance(n, int) for n in d.values()) for d in counts)
        and all(set(d) == set(SPLITS) for d in counts[:2])
        and isinstance(fields["sha256"], dict)
        and set(fields["sha256"]) == set(map(file_name, SPLITS))
        and isinstance(fields["tokenizer"], dict)
        and "name" in fields["tokenizer"]
    )


def has_expected_sizes(folder: Path, manifest: Manifest) -> bool:
    """Whether both token files are there with two bytes per token: a check that costs nothing."""
    paths = {split: folder / file_name(split) for split in SPLITS}
    return all(path.is_file() and path.stat().st_size == 2 * manifest.tokens[s] for s, path in paths.items())


def file_sha256(path: Path) -> str:
    """Hexadecimal hash of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` to `path`, which appears only once it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
