"""`python -m benchmarks.throughput`: tokens/s, MFU, step time, memory and time to first step of our training
step.

One row for each combination of the options that are given several values; each row is measured in a process
of its own. Under torchrun nothing is measured here: sharded runs report their own speed.
"""

import itertools
import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import tyro

from benchmarks.contenders import CONTENDERS, Work
from benchmarks.measure import choose_device, facts, finish, one_line_errors, say, spread, table
from benchmarks.worker import Worker, WorkerError
from nanogpt import perf
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config
from nanogpt.units import format_bytes

TINY = GPT2Config(vocab_size=2048, block_size=128, n_layer=1, n_head=4, n_embd=128)
CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Measure the training step for each combination of the values given."""

    model: tuple[Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], ...] = ("gpt2",)
    """Published sizes."""
    batch_size: tuple[int, ...] = (4,)
    """Sequences in a microstep, each at least 1."""
    block_size: tuple[int, ...] = (1024,)
    """Tokens in a sequence, each from 1 to 1024."""
    accumulation: int = 1
    """Microsteps in a step, at least 1."""
    precision: tuple[Literal["auto", "bfloat16", "float16", "float32"], ...] = ("auto",)
    """What is multiplied in; auto takes the fastest that trains on this device."""
    attention: tuple[Literal["auto", "flash", "cudnn", "efficient", "math"], ...] = ("auto",)
    """Attention kernels."""
    compile: tuple[bool, ...] = (True,)
    """Compiled, eager, or both."""
    contender: Literal["ours", "plain", "hugging_face", "litgpt"] = "ours"
    """Whose step."""
    steps: int = 10
    """Timed steps of each row, at least 2; 3 more come first."""
    starts: bool = False
    """Also time the first step twice with an empty compile cache of its own: cold, then warm in a new
    process."""
    device: str | None = None
    """cpu or cuda; None takes the GPU where there is one."""
    quick: bool = False
    """A model of one small layer, run eagerly, to see that everything works."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"{self.steps} steps, expected at least 2; set --steps")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "started on several processes, expected one: this measures the step of one device"
            )


def works_of(config: ThroughputConfig) -> list[Work]:
    """One Work for each combination."""
    device = choose_device(config.device)
    fastest = perf.default_precision(perf.detect(torch.device(device)))
    if config.quick:
        return [Work(model=TINY, batch_size=2, precision=fastest, compile=False, device=device)]
    combinations = itertools.product(
        config.model, config.block_size, config.batch_size, config.precision, config.attention, config.compile
    )
    return [
        Work(
            model=GPT2Config(**asdict(GPT2Config.named(model)) | {"block_size": block_size}),
            batch_size=batch_size,
            accumulation=config.accumulation,
            precision=fastest if precision == "auto" else precision,
            attention=attention,
            compile=compiled,
            device=device,
        )
        for model, block_size, batch_size, precision, attention, compiled in combinations
    ]


def measure(work: Work, config: ThroughputConfig, peaks: dict[str, tuple[float, str]]) -> dict[str, Any]:
    """One row: a work and its numbers, or what stopped it."""
    try:
        starts = cold_and_warm_s(config.contender, work) if config.starts and work.compile else {}
        with Worker(config.contender, work) as worker:
            started = worker.start()
            seconds = worker.turn(config.steps).seconds
            memory = worker.memory()
    except WorkerError as error:
        return {"work": asdict(work), "error": str(error).strip().splitlines()[-1]}
    step = spread(seconds)
    tokens_per_second = work.tokens / step.median
    peak, source = peaks[work.precision]
    flops = perf.flops_per_token(work.model, work.model.block_size)
    return {
        "work": asdict(work),
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops / peak,
        "peak_flops": peak,
        "peak_source": source,
        "step_s": step._asdict(),
        "seconds": seconds,
        "memory": memory._asdict(),
        "first_step_s": started.first_step_s,
        "starts": starts,
    }


def cold_and_warm_s(contender: str, work: Work) -> dict[str, float]:
    """Seconds to the first step, parameters included, with an empty compile cache and then with what that
    left."""
    starts = {}
    with tempfile.TemporaryDirectory(prefix="nanogpt-compile-") as cache:
        for name in ("cold_s", "warm_s"):
            with Worker(contender, work, {CACHE: cache}) as worker:
                started = worker.start()
            starts[name] = started.build_s + started.first_step_s
            say(f"{name}: {starts[name]:.1f}")
    return starts


def benchmark(config: ThroughputConfig) -> dict[str, Any]:
    """All rows."""
    works = works_of(config)
    device = torch.device(works[0].device)
    hardware = perf.detect(device)
    peaks = {
        precision: perf.peak_flops(hardware, precision) for precision in {work.precision for work in works}
    }
    rows = []
    for number, work in enumerate(works):
        rows.append(measure(work, config, peaks))
        outcome = rows[-1].get("error") or f"{rows[-1]['tokens_per_second']:,.0f} tokens/s"
        say(f"{number + 1} of {len(works)}: {outcome}")
    return {
        "benchmark": "throughput",
        "contender": config.contender,
        "facts": facts(str(device)),
        "rows": rows,
    }


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    header = ["model", "B x T", "precision", "attention", "compiled", "tokens/s", "MFU"]
    header += ["step s: median (min - max)", "peak memory", "first step s", "cold s", "warm s"]
    rows, sources = [], set()
    for row in result["rows"]:
        work, model = row["work"], row["work"]["model"]
        cells = [
            f"{model['n_layer']} x {model['n_embd']}",
            f"{work['batch_size']} x {model['block_size']}",
            work["precision"],
            work["attention"],
            "yes" if work["compile"] else "no",
        ]
        if "error" in row:
            rows.append([*cells, row["error"][:60], "", "", "", "", "", ""])
            continue
        step, starts = row["step_s"], row["starts"]
        sources.add(f"{row['peak_flops'] / 1e12:.4g} TFLOP/s, {row['peak_source']}")
        rows.append(
            [
                *cells,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})",
                format_bytes(row["memory"]["steps"]),
                f"{row['first_step_s']:.1f}",
                *(f"{starts[name]:.1f}" if name in starts else "" for name in ("cold_s", "warm_s")),
            ]
        )
    return "\n".join([table(header, rows), *(f"MFU is of {source}" for source in sorted(sources))])


def main() -> None:
    with one_line_errors():
        config = tyro.cli(ThroughputConfig)
        assert config.contender in CONTENDERS
        result = benchmark(config)
    print(table_of(result))
    finish(result)


if __name__ == "__main__":
    main()
