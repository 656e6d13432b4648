"""The text that ships with the package, as token files in the cache directory."""

import hashlib
import os
from importlib import resources
from pathlib import Path

import numpy as np

from nanogpt import __version__
from nanogpt.errors import UserError
from nanogpt.prepare.manifest import (
    MANIFEST_VERSION,
    SPLITS,
    Manifest,
    file_name,
    has_expected_sizes,
    read_manifest,
    write_atomically,
    write_manifest,
)
from nanogpt.tokenizer import Tokenizer, characters, gpt2

SHAKESPEARE = "shakespeare"
TAIL_FRACTION = 0.1
"""The last tenth of a single text validates, as nanoGPT holds it out of its Shakespeare."""


def cache_directory() -> Path:
    """`$NANOGPT_CACHE`, else `$XDG_CACHE_HOME/nanogpt`, else `~/.cache/nanogpt`."""
    if own := os.environ.get("NANOGPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt"


def ensure_bundled(tokenizer_name: str = "gpt2") -> Path:
    """A folder with `train.bin`, `val.bin` and `manifest.json` of the bundled Shakespeare, made on first use.

    It is in the cache directory under a name with a hash of text, tokenizer and format, so the folder of
    another version is never mistaken for it; a folder whose files do not have the sizes in its manifest is
    made again. Each file appears by rename and its bytes never vary, so several processes may do this at
    once. Raises UserError for an unknown tokenizer, and if the cache directory cannot be written.
    """
    text = bundled_text()
    tokenizer = tokenizer_named(tokenizer_name, text)
    key = f"{MANIFEST_VERSION} {__version__} {sha256(text.encode())} {tokenizer.describe()['sha256']}"
    name = SHAKESPEARE if tokenizer_name == "gpt2" else f"{SHAKESPEARE}-{tokenizer_name}"
    folder = cache_directory() / f"{name}-{sha256(key.encode())[:12]}"
    try:
        if (folder / "manifest.json").is_file() and has_expected_sizes(folder, read_manifest(folder)):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        write_bundled(folder, text, tokenizer)
    except OSError as error:
        raise UserError(
            f"cannot write the bundled text's tokens to {folder} ({error.strerror}), expected a writable "
            "cache directory; set NANOGPT_CACHE to another"
        ) from error
    return folder


def write_bundled(folder: Path, text: str, tokenizer: Tokenizer) -> None:
    """The three files: the last tenth of the text validates, the rest trains, each as one document."""
    cut = len(text) - int(len(text) * TAIL_FRACTION)
    ids = {s: as_document(tokenizer, part) for s, part in zip(SPLITS, (text[:cut], text[cut:]), strict=True)}
    data = {file_name(split): ids[split].astype("<u2").tobytes() for split in SPLITS}
    for name, content in data.items():
        write_atomically(folder / name, content)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        source=SHAKESPEARE,
        revision=None,
        tokenizer=tokenizer.describe(),
        vocab_size=tokenizer.vocab_size,
        documents=dict.fromkeys(SPLITS, 1),
        tokens={split: ids[split].size for split in SPLITS},
        sha256={name: sha256(content) for name, content in data.items()},
        max_token_id=int(max(ids[split].max() for split in SPLITS)),
        skipped={},
        settings={"val_fraction": TAIL_FRACTION, "split": "tail"},
    )
    write_manifest(folder, manifest)


def as_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of `text` and the end-of-text id, uint16."""
    ids = tokenizer.encode_array(text)
    return ids if tokenizer.end_of_text is None else np.append(ids, np.uint16(tokenizer.end_of_text))


def bundled_text() -> str:
    """The seven plays."""
    return resources.files("nanogpt").joinpath("assets/shakespeare.txt").read_text(encoding="utf-8")


def tokenizer_named(name: str, text: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` calls `name`; char knows the characters of `text`."""
    match name:
        case "gpt2":
            return gpt2()
        case "char":
            return characters(text)
    raise UserError(f"got the tokenizer {name!r}, expected gpt2 or char; set --tokenizer to one of them")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
