"""`python -m benchmarks.prepare`: speed of `python -m nanogpt.prepare`, compared with the bare tokenizer.

The corpus repeats the source's documents. The command is timed from start to end. The bare tokenizer begins
with all texts in memory and its processes started, and discards the ids. Each round times them all in turn.
"""

import json
import lzma
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.measure import (
    ended_with_us,
    facts,
    finish,
    one_line_errors,
    require_at_least,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
    versions_line,
)
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.prepare.bundled import bundled_text
from nanogpt.prepare.config import choose_engine
from nanogpt.prepare.engines import encode_each, fastokens_encoder
from nanogpt.prepare.manifest import read_manifest
from nanogpt.prepare.shards import batches
from nanogpt.tokenizer import gpt2
from nanogpt.units import format_bytes, format_count

POLL_S = 0.02
GOALS = {
    "tiktoken": "80 % of the bare tokenizer",
    "fastokens": "25M tokens/s on 2 cores of 170 MB, below 1 GB resident",
}


@dataclass(frozen=True, kw_only=True)
class PrepareBenchmark:
    """Time the whole command, JSON lines or parquet to token files, beside the bare tokenizer."""

    source: Path | None = None
    """JSON lines with a text, plain or .xz, to be repeated; the bundled plays' speeches otherwise."""
    megabytes: int = 170
    """Million characters of the corpus, at least 1; it is written to the temporary directory and removed."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of processes to try."""
    rounds: int = 3
    """Times that each is measured, in turns; at least 1."""
    quick: bool = False
    """A small corpus, to see that everything works."""

    def __post_init__(self) -> None:
        require_at_least(1, megabytes=self.megabytes, workers=self.workers, rounds=self.rounds)

    @property
    def small(self) -> "PrepareBenchmark":
        """The same with a corpus that takes seconds."""
        return replace(self, megabytes=2, workers=(2,), rounds=1)


def source_texts(path: Path | None) -> list[str]:
    """The texts to repeat. Raises UserError if the file holds none, or something else."""
    if path is None:
        return bundled_text().split("\n\n")
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            texts = [json.loads(line)["text"] for line in file]
        is_empty = not "".join(texts)
    except (OSError, ValueError, LookupError, TypeError, EOFError, lzma.LZMAError) as error:
        raise UserError(
            f"{path} cannot be read as JSON lines with a text ({type(error).__name__}: {error}); set another "
            f"--source, or leave it out for the bundled plays"
        ) from error
    if is_empty:  # and would be repeated forever
        raise UserError(f"{path} has no text, expected at least one character; set another --source")
    return texts


def repeated(texts: list[str], size: int) -> Iterator[str]:
    """The texts in turn until they have `size` characters together."""
    while size > 0:
        for text in texts:
            if size <= 0:
                return
            size -= len(text)
            yield text


def write_corpus(texts: list[str], folder: Path) -> dict[str, Path]:
    paths = {"json": folder / "corpus.jsonl", "parquet": folder / "corpus.parquet"}
    with paths["json"].open("w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), paths["parquet"], row_group_size=1000)
    return paths


def measure(
    texts: list[str], paths: dict[str, Path], engine: str, workers: int, *, rounds: int
) -> dict[str, Any]:
    """Tokens a second of the bare tokenizer and of the command on each format; the command's peak memory."""
    rates: dict[str, list[float]] = {what: [] for what in ("bare", *paths)}
    peak = tokens = 0
    for number in range(rounds):
        tokens, seconds = bare(texts, engine, workers)
        rates["bare"].append(tokens / seconds)
        for kind, path in paths.items():
            with tempfile.TemporaryDirectory(dir=path.parent) as out:
                seconds, used = command(path, Path(out), engine, workers)
                manifest = read_manifest(Path(out))
            total = sum(manifest.tokens.values())
            assert total == tokens + sum(manifest.documents.values()), (
                "other tokens than the bare tokenizer's"
            )
            rates[kind].append(tokens / seconds)  # the same tokens: ends of text do not count
            peak = max(peak, used)
        done = ", ".join(f"{what} {format_count(values[-1])}" for what, values in rates.items())
        say(f"round {number + 1}, {engine}, {workers} workers, tokens/s: {done}")
    summary = {what: spread(values)._asdict() for what, values in rates.items()}
    return {
        "engine": engine,
        "workers": workers,
        "tokens": tokens,
        "tokens_per_second": summary,
        "peak_bytes": peak,
    }


def bare(texts: list[str], engine: str, workers: int) -> tuple[int, float]:
    """Tokens and seconds of the tokenizer alone, in `workers` processes with a share of the texts each."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=keep, initargs=(barrier,)) as pool:
        shares = [texts[i::workers] for i in range(workers)]
        results = list(pool.map(bare_share, shares, [engine] * workers))
    tokens, starts, ends = zip(*results, strict=True)
    return sum(tokens), max(ends) - min(starts)


def keep(barrier: object) -> None:
    bare_share.barrier = barrier  # a barrier can only be passed to a process as it starts


def bare_share(texts: list[str], engine: str) -> tuple[int, float, float]:
    """Tokens, and when the work began (the tokenizer built and all processes ready) and ended."""
    lists = list(batches(texts))
    encode = partial(encode_each, gpt2()) if engine == "tiktoken" else fastokens_encoder()
    bare_share.barrier.wait()
    start = time.time()
    return sum(encode(batch)[0].size for batch in lists), start, time.time()


def command(source: Path, out: Path, engine: str, workers: int) -> tuple[float, int]:
    """Wall seconds of the whole command, and the peak of the resident bytes of all its processes together."""
    line = [sys.executable, "-m", "nanogpt.prepare", str(source), "--out", str(out)]
    line += ["--engine", engine, "--workers", str(workers)]
    nowhere = subprocess.DEVNULL
    start = time.perf_counter()
    with (
        ThreadPoolExecutor(1) as beside,  # its thread ends with the process
        ended_with_us(subprocess.Popen(line, stdout=nowhere, stderr=nowhere)) as process,
    ):
        peak = beside.submit(peak_resident_bytes, process)
        process.wait()
        seconds = time.perf_counter() - start
    assert process.returncode == 0, f"{line} ended with status {process.returncode}"
    return seconds, peak.result()


def peak_resident_bytes(process: subprocess.Popen[bytes]) -> int:
    """The largest `resident_bytes` until the process ends, polled every POLL_S, which takes little time."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(POLL_S)
    return peak


def resident_bytes(pid: int) -> int:
    """Of a process and all its descendants, counting shared pages once for each; 0 if it has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    lines = []
    for row in result["rows"]:
        bare_rate = row["tokens_per_second"]["bare"]["median"]
        for what, rates in row["tokens_per_second"].items():
            low, median, high = (format_count(rates[key]) for key in ("min", "median", "max"))
            memory = format_bytes(row["peak_bytes"]) if what != "bare" else ""
            share = f"{rates['median'] / bare_rate:.0%}"
            lines.append([row["engine"], str(row["workers"]), what, low, median, high, share, memory])
    header = ["tokenizer", "workers", "what", "tokens/s: min", "median", "max", "of bare", "peak memory"]
    return "\n".join([table(header, lines), *versions_line(result["versions"])])


def main() -> None:
    with one_line_errors():
        config = parse(PrepareBenchmark, default=PrepareBenchmark())
        say_what_quick_leaves_out(config, "megabytes", "workers", "rounds")
        config = config.small if config.quick else config
        engines = ["tiktoken"] + (["fastokens"] if choose_engine("auto", "gpt2") == "fastokens" else [])
        texts = list(repeated(source_texts(config.source), config.megabytes * 1_000_000))
        with tempfile.TemporaryDirectory(prefix="nanogpt-prepare-") as folder:
            paths = write_corpus(texts, Path(folder))
            cases = [(engine, workers) for engine in engines for workers in config.workers]
            rows = [measure(texts, paths, *case, rounds=config.rounds) for case in cases]
        result = {
            "benchmark": "prepare",
            "facts": facts("cpu"),
            "megabytes": config.megabytes,
            "versions": {name: version(name) for name in ("numpy", "pyarrow", *engines)},
            "goals": GOALS,
            "rows": rows,
        }
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
