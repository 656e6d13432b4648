"""`python -m benchmarks.data`: the loader's speed, mapped and with `pread`, and whether memory stays flat.

The file is 1 GB of random token ids, just written, so it is in the page cache: this is the speed of the
loader, not of a disk. Every window of it is read once, in training order and in training batches.
"""

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import (
    facts,
    finish,
    one_line_errors,
    require_at_least,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
)
from benchmarks.worker import peak_bytes, reset_peak, resident_bytes
from nanogpt.command import parse
from nanogpt.data import (
    TOKEN_BYTES,
    BatchSpec,
    MappedTokens,
    PreadTokens,
    Tokens,
    batch_at,
    prefetch,
    window_count,
)
from nanogpt.errors import UserError
from nanogpt.units import format_bytes, format_count

READERS = {"mapped": MappedTokens, "pread": PreadTokens}
GOALS = {"mapped": 50e6, "pread": 20e6}
"""Tokens a second; a GPU takes about 0.5 M."""
WRITE_BYTES = 32 << 20
VOCAB_SIZE = 50257


@dataclass(frozen=True, kw_only=True)
class DataBenchmark:
    """Read a token file as training does, mapped and with pread."""

    file_bytes: int = 1_000_000_000
    """Size of the file, two bytes per token of at least 4 batches; it is written to the temporary directory
    and removed."""
    path: Path | None = None
    """A token file to read instead."""
    block_size: int = 1024
    """Tokens in a sequence, at least 1."""
    batch_size: int = 64
    """Sequences in a microstep, at least 1."""
    total_batch_size: int = 524288
    """Tokens in a step, a multiple of those in a microstep."""
    rounds: int = 2
    """Times that each reader reads the file, in turns; at least 1."""
    quick: bool = False
    """A small file, to see that everything works."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            file_bytes=self.file_bytes,
            block_size=self.block_size,
            batch_size=self.batch_size,
            total_batch_size=self.total_batch_size,
            rounds=self.rounds,
        )
        micro = self.batch_size * self.block_size
        if self.total_batch_size % micro and not self.quick:  # whose batches are others
            raise UserError(
                f"total batch size is {self.total_batch_size:,} tokens, expected a multiple of {micro:,} "
                f"({self.batch_size} sequences x {self.block_size} tokens); set --total-batch-size, "
                f"--batch-size or --block-size"
            )
        if self.file_bytes % TOKEN_BYTES:
            raise UserError(
                f"file bytes is {self.file_bytes:,}, expected {TOKEN_BYTES} for each token; set --file-bytes"
            )

    @property
    def spec(self) -> BatchSpec:
        """The batches to read."""
        return BatchSpec(
            block_size=self.block_size,
            batch_size=self.batch_size,
            total_batch_size=self.total_batch_size,
            seed=1337,
        )

    @property
    def small(self) -> "DataBenchmark":
        """The same with a file and batches so small that it takes a second."""
        total_batch_size = 64 * self.block_size
        return replace(self, file_bytes=8 << 20, batch_size=8, total_batch_size=total_batch_size, rounds=1)


class Pass(NamedTuple):
    """One reading of the whole file."""

    tokens: int
    seconds: list[float]
    """Of each batch."""
    resident_growth_bytes: int
    """Memory in the last quarter of the batches minus memory in the first quarter (medians)."""
    peak_growth_bytes: int
    """Peak memory while reading, minus memory before."""


def steps_of(token_count: int, spec: BatchSpec) -> int:
    """Batches in an epoch of `token_count` tokens. Raises UserError if they are too few to tell anything."""
    steps = window_count(token_count, spec.block_size) // spec.sequences
    if steps < 4:
        raise UserError(
            f"the file holds {steps} batches, expected at least 4; set a larger --file-bytes, or another "
            f"--path or --total-batch-size"
        )
    return steps


def read_all(tokens: Tokens, spec: BatchSpec) -> Pass:
    """Reads every batch of one epoch."""
    steps = steps_of(len(tokens), spec)
    reset_peak("cpu")
    before, seconds, resident = resident_bytes(), [], []
    for step in range(steps):
        begin = time.perf_counter()
        batch = batch_at(tokens, step, spec)
        seconds.append(time.perf_counter() - begin)
        resident.append(resident_bytes())
        del batch
    quarter = steps // 4
    growth = statistics.median(resident[-quarter:]) - statistics.median(resident[:quarter])
    return Pass(steps * spec.total_batch_size, seconds, int(growth), peak_bytes("cpu") - before)


def wait_of_prefetch(tokens: Tokens, spec: BatchSpec, *, steps: int, step_s: float) -> float:
    """Median seconds that a step of `step_s` waits for its batch, which is read during the step before."""
    waits, begin = [], time.perf_counter()
    for _ in prefetch(lambda step: batch_at(tokens, step, spec), range(steps), torch.device("cpu")):
        waits.append(time.perf_counter() - begin)
        time.sleep(step_s)
        begin = time.perf_counter()
    return statistics.median(waits[1:])


def write_file(path: Path, size: int) -> None:
    """Writes random ids, as incompressible as a file of ids can be."""
    rng = np.random.default_rng(0)
    block = rng.integers(VOCAB_SIZE, size=WRITE_BYTES // 2, dtype=np.uint16)
    with path.open("wb") as file:
        for start in range(0, size, WRITE_BYTES):
            file.write(np.roll(block, start // WRITE_BYTES).tobytes()[: size - start])


def check_room(folder: Path, size: int) -> None:
    """Raises UserError if a file of `size` bytes would fill the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"a file of {format_bytes(size)} has no room in {folder.parent}, which has "
            f"{format_bytes(free)} free; set a smaller --file-bytes, or TMPDIR to a folder elsewhere"
        )


def measure(path: Path, config: DataBenchmark) -> dict[str, Any]:
    """Both readers' numbers."""
    passes: dict[str, list[Pass]] = {name: [] for name in READERS}
    waits = {}
    for number in range(config.rounds):
        for name, reader in READERS.items():
            tokens = reader(path)
            passes[name].append(read_all(tokens, config.spec))
            waits[name] = wait_of_prefetch(tokens, config.spec, steps=8, step_s=0.1)
            done = passes[name][-1]
            say(f"round {number + 1}, {name}: {format_count(done.tokens / sum(done.seconds))} tokens/s")
    size = path.stat().st_size
    return {
        "file_bytes": size,
        "readers": {name: summary(passes[name], waits[name], name) for name in READERS},
    }


def summary(passes: list[Pass], wait_s: float, name: str) -> dict[str, Any]:
    """One reader's numbers over all rounds."""
    per_batch = passes[0].tokens / len(passes[0].seconds)
    rates = [per_batch / seconds for done in passes for seconds in done.seconds]
    return {
        "tokens_per_second": sum(done.tokens for done in passes) / sum(sum(done.seconds) for done in passes),
        "batch_tokens_per_second": spread(rates)._asdict(),
        "resident_growth_bytes": max(done.resident_growth_bytes for done in passes),
        "peak_growth_bytes": max(done.peak_growth_bytes for done in passes),
        "wait_of_a_0.1_s_step": wait_s,
        "goal_tokens_per_second": GOALS[name],
    }


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    rows = []
    for name, row in result["readers"].items():
        rates = row["batch_tokens_per_second"]
        median, low, high = (format_count(rates[name]) for name in ("median", "min", "max"))
        rows.append(
            [
                name,
                format_count(row["tokens_per_second"]),
                f"{median} ({low} - {high})",
                format_count(row["goal_tokens_per_second"]),
                format_bytes(row["resident_growth_bytes"]),
                format_bytes(row["peak_growth_bytes"]),
                f"{1000 * row['wait_of_a_0.1_s_step']:.2f}",
            ]
        )
    header = ["reader", "tokens/s", "of a batch: median (min - max)", "goal", "memory growth", "memory peak"]
    return table([*header, "ms a 0.1 s step waits"], rows)


def main() -> None:
    with one_line_errors():
        config = parse(DataBenchmark, default=DataBenchmark())
        say_what_quick_leaves_out(config, "file_bytes", "batch_size", "total_batch_size", "rounds")
        config = config.small if config.quick else config
        with tempfile.TemporaryDirectory(prefix="nanogpt-data-") as folder:
            path = config.path
            if path is None:
                path = Path(folder, "train.bin")
                steps_of(config.file_bytes // TOKEN_BYTES, config.spec)
                check_room(path.parent, config.file_bytes)
                write_file(path, config.file_bytes)
            elif not path.is_file() or not path.stat().st_size:
                raise UserError(f"{path} is no file with tokens in it; set another --path, or leave it out")
            elif path.stat().st_size % TOKEN_BYTES:
                raise UserError(
                    f"{path} has {path.stat().st_size:,} bytes, expected {TOKEN_BYTES} for each token; set "
                    f"another --path, or leave it out"
                )
            result = {"benchmark": "data", "facts": facts("cpu")} | measure(path, config)
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
