"""`python -m nanogpt.prepare`: turns text into token files, and verifies or shows finished ones."""

import argparse
import difflib
import gc
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from nanogpt.errors import UserError
from nanogpt.prepare.config import (
    ENGINES,
    SPLIT_FRACTION,
    SPLIT_SEED,
    TOKENIZERS,
    Options,
    PrepareConfig,
    choose_engine,
)
from nanogpt.prepare.manifest import SPLITS, Manifest, file_name
from nanogpt.prepare.workers import start_server

DESCRIPTION = """\
Turn text into train.bin, val.bin (GPT-2 tokens, raw uint16) and manifest.json. Killed at any moment, the same
command continues where it was; finished, it does nothing. Documents keep the order of the source in both
files; which of them validate is drawn as `train_test_split` of `datasets` does with the same seed.

  python -m nanogpt.prepare openwebtext --out data/openwebtext
  python -m nanogpt.prepare HuggingFaceFW/fineweb-edu --config sample-10BT --out data/fineweb-edu
  python -m nanogpt.prepare roneneldan/TinyStories --out data/tinystories --skip-bad
  python -m nanogpt.prepare corpus/ --out data/corpus
  zcat dump.gz | python -m nanogpt.prepare - --out data/dump
  python -m nanogpt.prepare verify data/openwebtext
  python -m nanogpt.prepare inspect data/openwebtext
"""
LOOKS = {
    "verify": "Check everything that the manifest says about a folder.",
    "inspect": "Print counts, document lengths and a few documents of a folder.",
}


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    command, *rest = arguments or [""]
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a document may have any character
        if command in LOOKS:
            look(command, folder_argument(command, LOOKS[command], rest))
        else:
            config = parse(arguments)
            report(config.out, prepared(config), "ready")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        return 130
    return 0


def prepared(config: PrepareConfig) -> Manifest:
    """What `build.prepare` returns; the workers' server starts while that is being imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # more threads would spin while waiting for products
    start_server(choose_engine(config.engine, config.tokenizer))
    from nanogpt.prepare.build import prepare

    return prepare(config)


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence, without a table of flags."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.endswith("expected one argument"):
            hint = "; a value that begins with - follows an =, as in --separator=---"
        raise UserError(f"{message}, expected what `{self.prog} --help` lists{hint}")

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """The flags by name. Raises UserError for an unknown flag, suggesting the nearest one."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [f"--{name.replace('_', '-')}" for name in vars(parsed) if name != "source"]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise UserError(f"got {unknown[0]}, expected what `{self.prog} --help` lists; {hint}")
        return vars(parsed)


def parse(arguments: list[str]) -> PrepareConfig:
    parser = Parser(
        prog="python -m nanogpt.prepare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="openwebtext, owner/name on the hub (parquet), a file or folder of .parquet, "
        ".jsonl or .txt (the last two also .gz, .xz, .zst), - for standard input, or shakespeare (bundled); "
        "or a command: verify DIR, inspect DIR",
    )
    add_result_flags(parser)
    add_document_flags(parser)
    add_hub_flags(parser)
    add_work_flags(parser)
    flags = parser.parse(arguments)
    names = Options.__dataclass_fields__
    options = Options(**{name: value for name, value in flags.items() if name in names})
    return PrepareConfig(
        options=options, **{name: value for name, value in flags.items() if name not in names}
    )


def named_folder(typed: str) -> Path:
    """The folder of that name; `~` is the home directory, which a shell does not see in `--out=~/data`."""
    if not typed:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("got an empty name")
    return Path(os.path.expanduser(typed))


def add_result_flags(parser: Parser) -> None:
    group = parser.add_argument_group("the files that are made")
    group.add_argument(
        "--out",
        type=named_folder,
        required=True,
        metavar="DIR",
        help="folder for the files; created where it is missing",
    )
    group.add_argument(
        "--tokenizer",
        default="gpt2",
        choices=TOKENIZERS,
        help="byte pairs, or one id a character (%(default)s)",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="documents that validate, 0 to below 1 "
        f"({SPLIT_FRACTION}); of a single text, the part at its end (0.1)",
    )
    group.add_argument(
        "--split-seed",
        type=int,
        default=SPLIT_SEED,
        metavar="N",
        help="which documents validate, 0 or more (%(default)s)",
    )


def add_document_flags(parser: Parser) -> None:
    group = parser.add_argument_group("the documents of the source")
    group.add_argument(
        "--text-column", default="text", metavar="NAME", help="column or JSON field of the text (%(default)s)"
    )
    group.add_argument(
        "--separator",
        metavar="LINE",
        help="in text: a line of its own between documents, as in --separator=--- (a file is a document)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N documents, 1 or more (all)")
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out documents that cannot be used, and count them (stop there)",
    )


def add_hub_flags(parser: Parser) -> None:
    group = parser.add_argument_group("a source on the hub")
    group.add_argument(
        "--revision",
        metavar="REV",
        help="commit, tag or branch of a hub data set (the newest; openwebtext: a fixed one)",
    )
    group.add_argument(
        "--config", metavar="NAME", help="configuration of a hub data set, such as sample-10BT (its default)"
    )
    group.add_argument(
        "--split", default="train", metavar="NAME", help="split of a hub data set (%(default)s)"
    )
    group.add_argument(
        "--cached",
        action="store_true",
        help="download hub files into the cache of `datasets` first (read as a stream)",
    )


def add_work_flags(parser: Parser) -> None:
    group = parser.add_argument_group("the work")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, 1 or more; the files do not depend on it (one a core)",
    )
    group.add_argument(
        "--engine",
        default="auto",
        choices=("auto", *ENGINES),
        help="what does the work; fastokens is checked against "
        "tiktoken on the way and given up at the first difference (%(default)s: fastokens where installed)",
    )


def folder_argument(command: str, description: str, arguments: list[str]) -> Path:
    parser = Parser(prog=f"python -m nanogpt.prepare {command}", description=description, allow_abbrev=False)
    parser.add_argument("folder", type=named_folder, metavar="DIR", help="a folder that prepare wrote")
    return parser.parse(arguments)["folder"]


def look(command: str, folder: Path) -> None:
    """Verify or inspect `folder`, and print what is found."""
    from nanogpt.prepare import check

    try:
        if command == "verify":
            report(folder, check.verify(folder), "everything is as its manifest says")
        else:
            show(folder, *check.inspect(folder))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot read {folder} ({error}), expected files that can be read; see to their permissions"
        ) from error


def report(folder: Path, manifest: Manifest, word: str) -> None:
    for split in SPLITS:
        documents, tokens = manifest.documents[split], manifest.tokens[split]
        print(f"{file_name(split):9} {documents:>13,} documents {tokens:>16,} tokens")
    if manifest.skipped:
        print("left out:", ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()))
    print(f"{folder}: {word}")


def show(folder: Path, manifest: Manifest, looks: dict[str, Any]) -> None:
    revision = f" at {manifest.revision}" if manifest.revision else ""
    print(f"{folder}: {manifest.source}{revision}, {manifest.tokenizer['name']}, {manifest.vocab_size:,} ids")
    for split, look in looks.items():
        print(f"\n{file_name(split)}: {look.documents:,} documents, {look.tokens:,} tokens")
        if look.length_percentiles:
            lengths = ", ".join(f"{p} %: {length:,}" for p, length in look.length_percentiles.items())
            print(f"tokens a document by percentile: {lengths}")
        for text in look.samples:
            print(f"  | {text[:400]!r}")


if __name__ == "__main__":
    status = main(sys.argv[1:])
    gc.freeze()  # or all imports are searched for garbage before the process ends
    sys.exit(status)
