"""A run that takes a second: its command line, its token files, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.tokenizer import characters

ALPHABET = "\n" + "".join(map(chr, range(65, 65 + 31)))
TINY = {
    "--model.vocab-size": 32,
    "--model.block-size": 16,
    "--model.n-layer": 1,
    "--model.n-head": 2,
    "--model.n-embd": 16,
    "--model.dropout": 0.1,
    "--optim.warmup-steps": 2,
    "--data.batch-size": 4,
    "--data.total-batch-size": 128,
    "--train.max-steps": 20,
    "--train.device": "cpu",
    "--train.precision": "float32",
    "--eval.interval": 5,
    "--eval.tokens": 80,  # five windows in batches of four: the last one is not full
    "--checkpoint.interval": 5,
    "--sample.interval": 5,
    "--sample.tokens": 20,
    "--track.wandb": "disabled",
}
EAGER = ("--train.no-compile",)


def arguments(*switches: str, **changes: Any) -> list[str]:
    """TINY as a command line; `model__n_head=4` changes one value, None drops the flag."""
    named = {f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in changes.items()}
    flags = {name: value for name, value in (TINY | named).items() if value is not None}
    return [*(str(part) for flag in flags.items() for part in flag), *switches]


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """The same tokens for training and validation, and a manifest."""
    path.mkdir(exist_ok=True)
    for split in ("train", "val"):
        tokens.astype("<u2").tofile(path / f"{split}.bin")
    counts = dict.fromkeys(("train", "val"), len(tokens))
    about = {
        "tokenizer": characters(ALPHABET).describe(),
        "tokens": counts,
        "max_token_id": int(tokens.max()),
    }
    (path / "manifest.json").write_text(json.dumps(about))


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file and folder below."""
    return {str(entry): entry.read_bytes() if entry.is_file() else None for entry in path.rglob("*")}
