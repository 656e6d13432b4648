"""The settings of a `prepare` run. Cheap to import, so that the command can start its workers early."""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from nanogpt.errors import UserError

TOKENIZERS = ("gpt2", "char")
ENGINES = ("tiktoken", "fastokens")
"""The libraries that can encode GPT-2's tokens."""
SPLIT_FRACTION, SPLIT_SEED = 0.0005, 2357
"""nanoGPT's values for OpenWebText, which give its 4,007 validation documents."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read a source; each field is the flag of that name."""

    revision: str | None = None
    config: str | None = None
    split: str = "train"
    separator: str | None = None
    cached: bool = False
    val_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """A run of `prepare`; each field is the flag of that name."""

    source: str
    out: Path
    workers: int | None = None
    """Number of processes; None is one for each core that this process may use."""
    tokenizer: str = "gpt2"
    text_column: str = "text"
    split_seed: int = SPLIT_SEED
    limit: int | None = None
    skip_bad: bool = False
    engine: str = "auto"
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("got an empty SOURCE, expected text to prepare; name a file or a data set")
        fraction = self.options.val_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise UserError(
                f"got --val-fraction {fraction}, expected at least 0 and below 1; the usual is 0.0005"
            )
        if self.workers is not None and self.workers < 1:
            raise UserError(f"got --workers {self.workers}, expected 1 or more; leave it out for one a core")
        if self.limit is not None and not 1 <= self.limit <= sys.maxsize:
            raise UserError(
                f"got --limit {self.limit}, expected 1 or more documents, up to {sys.maxsize:,}; "
                "leave it out for all"
            )
        if self.split_seed < 0:
            raise UserError(
                f"got --split-seed {self.split_seed}, expected 0 or more; the usual is {SPLIT_SEED}"
            )
        if self.tokenizer not in TOKENIZERS:
            raise UserError(f"got --tokenizer {self.tokenizer}, expected gpt2 or char; set one of them")
        if self.engine not in ("auto", *ENGINES):
            raise UserError(
                f"got --engine {self.engine}, expected auto, {' or '.join(ENGINES)}; set one of them"
            )
        if self.engine == "fastokens" and choose_engine("auto", self.tokenizer) != "fastokens":
            raise UserError(
                "got --engine fastokens, expected it installed and --tokenizer gpt2; "
                "install `nanogpt[fast]` or leave the flag out"
            )


def choose_engine(wanted: str, tokenizer_name: str) -> str:
    """The engine that `--engine wanted` means: `auto` is the fastest installed one that has the tokenizer."""
    if wanted != "auto":
        return wanted
    installed = tokenizer_name == "gpt2" and importlib.util.find_spec("fastokens") is not None
    return "fastokens" if installed else "tiktoken"
