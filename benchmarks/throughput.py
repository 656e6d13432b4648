"""`python -m benchmarks.throughput`: our training step's tokens/s, MFU, time, memory and time to first step.

One row for each combination of the options that are given several values. Without torchrun, each row is
measured in a process of its own. Under torchrun all ranks take the sharded step together, and rank 0 prints
tokens/s of the whole job, MFU relative to the peak of all devices, and the memory of the largest rank.
"""

import gc
import itertools
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.contenders import SEED, Work, batches_of, check_imports, make_optimizer, step_of
from benchmarks.measure import (
    FIRST_STEP,
    choose_device,
    facts,
    finish,
    one_line_errors,
    require_at_least,
    require_at_most,
    require_some,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
)
from benchmarks.worker import WARMUP_STEPS, Worker, WorkerError, peak_bytes, reset_peak
from nanogpt import perf, sharding
from nanogpt.attention import Attention
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.loss import chunk_tokens_of
from nanogpt.meeting import World, world
from nanogpt.model import GPT2Config
from nanogpt.processes import Team
from nanogpt.train import init_state
from nanogpt.units import format_bytes

CUDA_TURNS = 5
TINY = GPT2Config(vocab_size=2048, block_size=128, n_layer=1, n_head=4, n_embd=128)
SIZES = ("model", "batch_size", "block_size", "accumulation", "precision", "attention", "compile", "starts")
"""Fields that --quick leaves out, since it has one work of its own."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
STARTS = """\
cold and warm: from torch's import to the end of a first step in a new process, with an empty compile cache,
and with what that left; PyTorch's precompiled header, which lies elsewhere, may be there from earlier ones"""
COLLECTIVE_LIMIT_S = 1800.0  # ranks wait for one another while each compiles


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the processes of torchrun share the state; their product is the number of processes."""

    shard: int | None = None
    """Processes that share one copy, at least 1; None: those of a machine."""
    replicate: int | None = None
    """Copies, at least 1; None: what shard leaves."""
    reshard_after_forward: bool = False
    """Whether a block's parameters are gathered a second time for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Measure the training step for each combination of the values given."""

    model: tuple[Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"], ...] = ("gpt2",)
    """Published sizes."""
    batch_size: tuple[int, ...] = (4,)
    """Sequences in a microstep of one device, each at least 1."""
    block_size: tuple[int, ...] = (1024,)
    """Tokens in a sequence, each from 1 to 1024."""
    accumulation: int = 1
    """Microsteps in a step, at least 1."""
    precision: tuple[Literal["auto", "bfloat16", "float16", "float32"], ...] = ("auto",)
    """What is multiplied in; auto takes the fastest that trains on this device."""
    attention: tuple[Attention, ...] = ("auto",)
    """Attention kernels."""
    compile: tuple[bool, ...] = (True,)
    """Compiled, eager, or both."""
    contender: Literal["ours", "plain", "hugging_face", "litgpt"] = "ours"
    """Whose step."""
    steps: int = 10
    """Timed steps of each row, at least 2; 3 more come first. On CUDA in 5 turns of a fifth of them each,
    at least one, and rounded down."""
    starts: bool = False
    """Also time the first row's first step twice, with an empty compile cache of its own: cold, then warm in
    a new process."""
    mesh: Mesh = field(default_factory=Mesh)
    device: str | None = None
    """cpu or cuda; None takes the GPU if there is one."""
    quick: bool = False
    """A model of one small layer, run eagerly, to see that everything works."""

    def __post_init__(self) -> None:
        require_at_least(2, steps=self.steps)
        require_at_least(
            1, batch_size=self.batch_size, block_size=self.block_size, accumulation=self.accumulation
        )
        require_at_most(GPT2Config.block_size, block_size=self.block_size)
        require_some(
            model=self.model, precision=self.precision, attention=self.attention, compile=self.compile
        )
        if self.contender != "ours" and self.attention != ("auto",):
            raise UserError(
                f"--attention {' '.join(self.attention)} with --contender {self.contender}, which has its "
                f"own, expected auto; leave one of them out"
            )
        if self.starts and not self.compile[0]:
            raise UserError(
                "--starts with an eager first row, which finds and leaves no compile cache, expected a "
                "compiled one; set --compile True, or leave --starts out"
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


def measure(work: Work, config: ThroughputConfig, *, starts: bool) -> dict[str, Any]:
    """One row without its MFU: a work and its numbers, or what stopped it."""
    try:
        starts = cold_and_warm_s(config.contender, work) if starts and work.compile else {}
        with Worker(config.contender, work) as worker:
            started = worker.start()
            if work.device == "cpu":
                seconds = worker.turn(config.steps).seconds
            else:  # a turn's steps are timed together
                steps = max(config.steps // CUDA_TURNS, 1)
                seconds = [s for _ in range(CUDA_TURNS) for s in worker.turn(steps).seconds]
            memory = worker.memory()
    except WorkerError as error:
        return {"work": asdict(work), "error": error.last_line}
    return row_of(work, seconds, memory._asdict(), started.first_step_s) | {"starts": starts}


def row_of(
    work: Work, seconds: list[float], memory: dict[str, int], first_step_s: float, *, ranks: int = 1
) -> dict[str, Any]:
    """One row without its MFU: `ranks` times the work took `seconds`; `memory` is the fullest device's."""
    step = spread(seconds)
    tokens_per_second = ranks * work.tokens / step.median
    return {
        "work": asdict(work),
        "loss_chunk_tokens": chunk_tokens_of(work.device, work.precision),
        "ranks": ranks,
        "tokens_per_second": tokens_per_second,
        "flops_per_second": tokens_per_second * perf.flops_per_token(work.model, work.model.block_size),
        "step_s": step._asdict(),
        "seconds": seconds,
        "memory": memory,
        "first_step_s": first_step_s,
        "starts": {},
    }


Peaks = dict[str, tuple[float, str]]
"""By precision: FLOP/s of all devices together, and where that comes from."""


def higher(one: Peaks, other: Peaks) -> Peaks:
    """The higher of both, for each precision.

    A CPU's peak is measured before, between and after the rows: other programs can only lower it, and a peak
    that is low for a moment would overstate the MFU.
    """
    return {precision: max(one[precision], other[precision]) for precision in one}


def with_mfu(rows: list[dict[str, Any]], peaks: Peaks) -> list[dict[str, Any]]:
    """The rows with their MFU, the share of their precision's peak that they reached."""
    results = []
    for row in rows:
        if "error" not in row:
            peak, source = peaks[row["work"]["precision"]]
            row = row | {"mfu": row["flops_per_second"] / peak, "peak_flops": peak, "peak_source": source}
        results.append(row)
    return results


def cold_and_warm_s(contender: str, work: Work) -> dict[str, float]:
    """Seconds to the first step, parameters included: with an empty compile cache, then with a filled one."""
    starts = {}
    with tempfile.TemporaryDirectory(prefix="nanogpt-compile-") as cache:
        for name in ("cold_s", "warm_s"):
            with Worker(contender, work, dict.fromkeys(CACHES, cache)) as worker:
                started = worker.start()
            starts[name] = started.build_s + started.first_step_s
            say(f"{name}: {starts[name]:.1f}")
    return starts


def benchmark(config: ThroughputConfig) -> dict[str, Any]:
    """All rows."""
    check_imports(config.contender)
    works = works_of(config)
    device = torch.device(works[0].device)
    hardware = perf.detect(device)
    precisions = {work.precision for work in works}

    def peaks_now() -> Peaks:
        return {precision: perf.peak_flops(hardware, precision) for precision in precisions}

    rows, peaks = [], peaks_now()
    for number, work in enumerate(works):
        rows.append(measure(work, config, starts=config.starts and not rows))
        peaks = higher(peaks, peaks_now())
        outcome = rows[-1].get("error") or f"{rows[-1]['tokens_per_second']:,.0f} tokens/s"
        say(f"{number + 1} of {len(works)}: {outcome}")
    return {
        "benchmark": "throughput",
        "contender": config.contender,
        "facts": facts(str(device)),
        "rows": with_mfu(rows, peaks),
    }


def benchmark_sharded(config: ThroughputConfig, here: World) -> dict[str, Any]:
    """All rows, measured by all ranks together; every rank must call it, within a process group."""
    works = works_of(config)
    device = torch.device(works[0].device)
    hardware = perf.detect(device)
    shape = sharding.mesh_shape(
        shard=config.mesh.shard,
        replicate=config.mesh.replicate,
        size=here.size,
        local_size=here.local_size,
    )
    mesh = sharding.make_mesh(device.type, shape)
    precisions = sorted({work.precision for work in works})  # in the same order on all ranks

    def peaks_now() -> Peaks:
        return {precision: peak_of_all(hardware, precision) for precision in precisions}

    rows, peaks = [], peaks_now()
    for number, work in enumerate(works):
        rows.append(measure_sharded(work, config, mesh))
        peaks = higher(peaks, peaks_now())
        if here.rank == 0:
            say(f"{number + 1} of {len(works)}: {rows[-1]['tokens_per_second']:,.0f} tokens/s")
    return {
        "benchmark": "throughput",
        "contender": "ours",
        "facts": facts(str(device)),
        "mesh": {
            "replicate": shape[0],
            "shard": shape[1],
            "reshard_after_forward": config.mesh.reshard_after_forward,
        },
        "rows": with_mfu(rows, peaks),
    }


def peak_of_all(hardware: perf.Hardware, precision: str) -> tuple[float, str]:
    """The sum of all ranks' peaks in FLOP/s; if these are measured, all ranks measure at the same time."""
    dist.barrier()
    peak, source = perf.peak_flops(hardware, precision)
    total = torch.tensor(peak, dtype=torch.float64, device=hardware.device)
    dist.all_reduce(total)
    return total.item(), f"the sum over {dist.get_world_size()} ranks; each: {source}"


def measure_sharded(work: Work, config: ThroughputConfig, mesh: DeviceMesh) -> dict[str, Any]:
    """One row without its MFU, the same on all ranks.

    On CUDA the steps are launched back to back, and their time is the mean.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    optimizer, batches = make_optimizer(work), batches_of(work, rank, size)
    state = init_state(work.model, optimizer, torch.Generator(work.device).manual_seed(SEED), mesh=mesh)
    step = step_of(state, optimizer, work, mesh=mesh, reshard_after_forward=config.mesh.reshard_after_forward)
    del state

    def timed(steps: int) -> float:
        begin = time.perf_counter()
        for number in range(steps):
            loss = step(batches[number % len(batches)])
        loss.item()  # waits for all ranks and all launched steps
        return (time.perf_counter() - begin) / steps

    first_step_s = timed(1)
    timed(WARMUP_STEPS)
    whole = peak_bytes(work.device)
    reset_peak(work.device)
    seconds = [timed(1) for _ in range(config.steps)] if work.device == "cpu" else [timed(config.steps)]
    steps_peak = peak_bytes(work.device)
    largest = torch.tensor([steps_peak, max(whole, steps_peak), *seconds, first_step_s], dtype=torch.float64)
    largest = largest.to(work.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    of_steps, whole, *seconds, first_step_s = largest.tolist()
    del step
    gc.collect()
    if work.device != "cpu":
        torch.cuda.empty_cache()  # the next row's peak is its own
    memory = {"steps": int(of_steps), "whole": int(whole)}
    return row_of(work, seconds, memory, first_step_s, ranks=size)


def check_sharded(config: ThroughputConfig) -> ThroughputConfig:
    """`config`; raises UserError if it asks for something that several processes do not measure."""
    if config.contender != "ours" or config.starts:
        raise UserError(
            "started on several processes with --contender or --starts, which are measured by one; "
            "leave them out, or start without torchrun"
        )
    return config


def check_alone(config: ThroughputConfig) -> ThroughputConfig:
    """`config`; raises UserError if it asks for something that one process does not measure."""
    if config.mesh != Mesh():
        raise UserError(
            "started on one process with --mesh.*, which several share; start with torchrun "
            "--nproc-per-node N -m benchmarks.throughput, or leave --mesh.* out"
        )
    return config


def run_as_rank(here: World) -> None:
    """This process's side of a torchrun job; rank 0 prints."""
    with Team(here) as team:
        config = team.together(lambda: check_sharded(parse(ThroughputConfig, default=ThroughputConfig())))
        if here.rank == 0:
            say_what_quick_leaves_out(config, *SIZES)
        device_type = choose_device(config.device)
        with team.connected(device_type, timeout_s=COLLECTIVE_LIMIT_S):
            result = benchmark_sharded(replace(config, device=device_type), here)
        if here.rank == 0:
            print(table_of(result))
            finish(result)


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    header = ["model", "ranks", "B x T", "precision", "attention", "compiled", "tokens/s", "MFU"]
    header += ["step s: median (min - max)", "peak memory", "first step s", "cold s", "warm s"]
    rows, sources = [], set()
    for row in result["rows"]:
        work, model = row["work"], row["work"]["model"]
        cells = [
            f"{model['n_layer']} x {model['n_embd']}",
            str(row.get("ranks", 1)),
            f"{work['batch_size']} x {model['block_size']}"
            + (f" x {work['accumulation']}" if work["accumulation"] > 1 else ""),
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
    several = any(row["work"]["accumulation"] > 1 for row in result["rows"])
    notes = ["B x T x the microsteps of a step"] if several else []
    notes += [*(f"MFU is of {source}" for source in sorted(sources)), FIRST_STEP]
    notes += [STARTS] if any(row.get("starts") for row in result["rows"]) else []
    if mesh := result.get("mesh"):
        gathered = "twice" if mesh["reshard_after_forward"] else "once"
        layout = f"{mesh['replicate']} replicas x {mesh['shard']} shards"
        notes.append(f"the state is {layout}, a block's parameters are gathered {gathered}")
    return "\n".join([table(header, rows), *notes])


def main() -> None:
    with one_line_errors():
        here = world()
        if here.size > 1:
            run_as_rank(here)
            return
        config = check_alone(parse(ThroughputConfig, default=ThroughputConfig()))
        say_what_quick_leaves_out(config, *SIZES)
        result = benchmark(config)
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
