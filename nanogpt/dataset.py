"""The data folder of a run: found, opened and checked before anything is computed with it."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from nanogpt.config import RunConfig
from nanogpt.data import Tokens, check_tokens, fingerprint, open_tokens, read_manifest
from nanogpt.errors import UserError
from nanogpt.prepare.bundled import ensure_bundled
from nanogpt.tokenizer import Tokenizer, gpt2, tokenizer_from

OPENWEBTEXT = Path("data/openwebtext")
BUNDLED = {"shakespeare": "gpt2", "shakespeare-char": "char"}


class Dataset(NamedTuple):
    """An opened and checked data folder."""

    folder: Path
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer | None
    """None if neither a manifest nor the vocabulary's size identifies it."""
    hash: str
    """Of samples of both files: all of a small one, 1,024 blocks of a large one."""
    sha256: dict[str, str] | None
    """Of each whole file, as the manifest says; None if none does."""
    note: str
    """Why this folder was chosen, if the user has not named one, or what a run cannot do with it."""


def open_dataset(config: RunConfig) -> Dataset:
    """The data folder of `config`, opened and checked.

    Raises UserError for a missing folder, for what `open_tokens` and `check_tokens` reject, and for a
    `--sample.prompt` that is empty or has tokens that the model lacks.
    """
    folder, note = find_folder(config.data.path)
    manifest = read_manifest(folder)
    train, val = (open_split(folder, split, manifest, config) for split in ("train", "val"))
    tokenizer = tokenizer_from(manifest["tokenizer"]) if manifest else None
    if manifest is None and config.model.vocab_size == gpt2().vocab_size:
        tokenizer = gpt2()  # nanoGPT's folders hold GPT-2's tokens and do not say so
    if tokenizer is None:
        note = "no samples: without a manifest nothing says which text its ids stand for"
    else:
        check_prompt(tokenizer, config)
    sha256 = manifest.get("sha256") if manifest else None
    return Dataset(folder, train, val, tokenizer, f"{fingerprint(train)}-{fingerprint(val)}", sha256, note)


def find_folder(path: str | None) -> tuple[Path, str]:
    """The folder that `--data.path` names or, if None, a default, with a note if that is the bundled text.

    Raises UserError if there is no such folder.
    """
    if path is None and not is_folder(OPENWEBTEXT):
        return ensure_bundled(BUNDLED["shakespeare"]), f"bundled, since {OPENWEBTEXT} is not prepared"
    folder = OPENWEBTEXT if path is None else Path(path)
    if path in BUNDLED and not is_folder(folder):
        return ensure_bundled(BUNDLED[path]), ""
    if not is_folder(folder) and folder.exists():
        raise UserError(
            f"{folder} is a file, expected a folder with train.bin and val.bin; set --data.path to the one "
            f"that holds them, or make one of a text with python -m nanogpt.prepare "
            f"{shlex.quote(str(folder))} --out {shlex.quote(f'data/{folder.stem}')}"
        )
    if not is_folder(folder):
        raise UserError(
            f"no data folder at {folder}; set --data.path to a folder with train.bin and val.bin or to "
            f"shakespeare, or prepare one with python -m nanogpt.prepare openwebtext --out "
            f"{shlex.quote(str(folder))}"
        )
    return folder, ""


def is_folder(path: Path) -> bool:
    """Whether there is such a folder. Raises UserError if the system does not tell."""
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(
            f"the data folder {path} cannot be looked at ({error.strerror}), expected one that you may read; "
            f"set --data.path to another"
        ) from error


def open_split(folder: Path, split: str, manifest: dict[str, Any] | None, config: RunConfig) -> Tokens:
    """The tokens of train.bin or val.bin, as many as the manifest says and all in the model's vocabulary."""
    file = folder / f"{split}.bin"
    tokens = open_tokens(file)
    if manifest and len(tokens) != manifest["tokens"][split]:
        raise UserError(
            f"{file} has {len(tokens):,} tokens, its manifest says {manifest['tokens'][split]:,}; "
            f"prepare the folder again"
        )
    check_tokens(
        tokens,
        file,
        vocab_size=config.model.vocab_size,
        block_size=config.model.block_size,
        max_token_id=manifest["max_token_id"] if manifest else None,
    )
    return tokens


def check_prompt(tokenizer: Tokenizer, config: RunConfig) -> None:
    """Raises UserError unless the prompt has ids and the model has them all."""
    prompt = config.sample.prompt
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--sample.prompt {prompt!r}: {error}") from error
    if not ids or max(ids) >= config.model.vocab_size:
        raise UserError(
            f"the prompt {prompt!r} has the token ids {ids}, expected at least one and all "
            f"below --model.vocab-size {config.model.vocab_size:,}; set another --sample.prompt"
        )
