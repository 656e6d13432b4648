"""`python -m benchmarks.predict`: tokens/s and memory on hardware not at hand, next to published results.

The model: a step's matrix products and attention run at a share of the data sheet's rate, its elementwise
work and its optimizer move bytes at a share of the data sheet's bandwidth, and the gradients' all-reduce is a
ring in each node and one across nodes, hidden behind backward as far as that lasts. Every row says whether it
is measured, published, claimed or predicted; predictions carry the model's error on the published runs, and a
measured row says how far off the model was. If one GPU was measured, several of its kind are also predicted
from that measurement: its step plus what the all-reduce adds. Memory is that of a rank in
`benchmarks.dry_run`, which `python -m benchmarks.sharding` compares with real processes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import dry_run
from benchmarks.contenders import Work
from benchmarks.measure import (
    facts,
    finish,
    one_line_errors,
    read_json,
    require_at_least,
    table,
    whole_results,
)
from nanogpt import perf
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.loss import chunk_tokens_of
from nanogpt.model import GPT2Config
from nanogpt.units import format_bytes

EPOCH_TOKENS = 9_035_582_198  # OpenWebText, without the validation part
MATMUL_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.70, 0.75, 0.70
"""Fractions of the data sheet's rates: round numbers, the same for all GPUs; the error left is reported."""
ELEMENTWISE_NUMBERS = 44
"""Numbers that a block's norms, GELU, residuals and attention read and write per token, forward and backward,
in units of n_embd."""
LOGIT_BYTES = 10
"""Read and written per logit: the logit itself, its softmax, and its gradient, which two products read."""


class Gpu(NamedTuple):
    """Data-sheet rates of a GPU; peak FLOP/s come from `perf.DATA_SHEETS`."""

    sheet: str
    bandwidth: float
    """Of its memory, in bytes per second."""
    nvlink: float
    """To the GPUs of its node, in bytes per second and direction."""


GPUS = {
    "A100": Gpu("A100 SXM4", 2.039e12, 300e9),
    "H100": Gpu("H100 HBM3", 3.35e12, 450e9),
}
"""Sources: NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM."""
NETWORK = 50e9
"""Bytes per second and GPU between nodes: each GPU has a 400 Gbit/s adapter."""


class Machine(NamedTuple):
    """GPUs, and how many nodes they are spread over."""

    gpu: str
    count: int
    nodes: int = 1


MACHINES = {
    "1x A100": Machine("A100", 1),
    "8x A100": Machine("A100", 8),
    "1x H100": Machine("H100", 1),
    "8x H100": Machine("H100", 8),
    "16x H100, 2 nodes": Machine("H100", 16, 2),
}


class Published(NamedTuple):
    """What somebody reported for GPT-2 124M."""

    who: str
    machine: str
    tokens_per_second: float
    source: str
    kind: str = "published"
    """"claimed" if nobody says how it was measured."""


PUBLISHED = [
    Published(
        "claimed for this project", "8x A100", 350e3, "the table that the project is known for", "claimed"
    ),
    Published(
        "claimed for this project", "8x H100", 600e3, "the table that the project is known for", "claimed"
    ),
    Published(
        "nanoGPT",
        "8x A100",
        600_000 * 491_520 / (4 * 86_400),
        "karpathy/nanoGPT README: 600,000 steps of 491,520 tokens in about 4 days (A100 40GB)",
    ),
    Published(
        "llm.c", "8x A100", 10e9 / (90 * 60), "karpathy/llm.c discussion 481: 10 B tokens in about 90 minutes"
    ),
    Published(
        "llm.c",
        "8x H100",
        10e9 / (45 * 60),
        "KellerJordan/modded-nanogpt README: llm.c took 45 minutes for 10 B tokens",
    ),
]
CALIBRATED_ON = "llm.c"  # the others are far from the limit, which says nothing about the hardware


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Predict GPT-2's training speed on GPUs."""

    batch_size: int = 64
    """Sequences in a microstep, at least 1."""
    total_batch_size: int = 524288
    """Tokens in a step over all GPUs, at least 16384: a sequence for each GPU of the largest machine."""
    measured: Path | None = None
    """JSON of `benchmarks.throughput` or `benchmarks.peers` on one A100 or H100, or a report with one; its
    rate stands beside the prediction."""
    quick: bool = False
    """Leave out the memory of several GPUs, whose dry runs take a minute."""

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size)
        gpus = max(machine.count for machine in MACHINES.values())
        require_at_least(gpus * GPT2Config.block_size, total_batch_size=self.total_batch_size)


def microstep_s(config: GPT2Config, tokens: float, gpu: Gpu) -> float:
    """Seconds of forward and backward over `tokens` tokens."""
    # Only FLOPs that are really done take time: a causal kernel skips half of attention's.
    flops = (
        6 * perf.parameter_count(config, positions=False)
        + 6 * config.n_layer * config.n_embd * config.block_size
    )
    moved = 2 * ELEMENTWISE_NUMBERS * config.n_layer * config.n_embd + LOGIT_BYTES * config.padded_vocab_size
    peak = perf.DATA_SHEETS[gpu.sheet].half * 1e12
    return tokens * (flops / (MATMUL_SHARE * peak) + moved / (BANDWIDTH_SHARE * gpu.bandwidth))


def optimizer_s(config: GPT2Config, gpu: Gpu) -> float:
    """Seconds of an update, in fp32: the norm reads the gradient first, then the update reads it again.

    It also reads parameter and two moments, and writes these three.
    """
    return 8 * 4 * perf.parameter_count(config) / (BANDWIDTH_SHARE * gpu.bandwidth)


def all_reduce_s(config: GPT2Config, machine: Machine) -> float:
    """Seconds of a sum over all GPUs' fp32 gradients, as the state's layout asks for it.

    That is a ring within each node, and one across nodes for the part that each GPU of a node keeps.
    """
    size, local = 4 * perf.parameter_count(config), machine.count // machine.nodes
    return ring_s(local, size, GPUS[machine.gpu].nvlink) + ring_s(machine.nodes, size / local, NETWORK)


def ring_s(count: int, size: float, link: float) -> float:
    """Seconds in which a ring of `count` devices sums `size` bytes of each over links of `link` bytes/s."""
    return 2 * (count - 1) / count * size / (LINK_SHARE * link)


def step_s(config: GPT2Config, machine: Machine, *, total_batch_size: int, batch_size: int) -> float:
    """Seconds of a step."""
    gpu = GPUS[machine.gpu]
    tokens = total_batch_size / machine.count
    compute = microstep_s(config, tokens, gpu)
    exposed = exposed_s(config, machine, compute, tokens=tokens, batch_size=batch_size)
    return compute + optimizer_s(config, gpu) + exposed


def exposed_s(
    config: GPT2Config, machine: Machine, compute: float, *, tokens: float, batch_size: int
) -> float:
    """Seconds of the all-reduce that the last microstep's backward, two thirds of it, cannot hide.

    `compute` is the seconds that a GPU takes for its `tokens`.
    """
    last = compute * min(1.0, batch_size * config.block_size / tokens)
    return max(0.0, all_reduce_s(config, machine) - last * 2 / 3)


def predictions(config: PredictConfig, model: GPT2Config) -> dict[str, float]:
    """Tokens per second of each machine."""
    return {
        name: config.total_batch_size
        / step_s(model, machine, total_batch_size=config.total_batch_size, batch_size=config.batch_size)
        for name, machine in MACHINES.items()
    }


def error_on_published(predicted: dict[str, float]) -> dict[str, float]:
    """Predicted over published rate, minus one, for the runs of CALIBRATED_ON."""
    return {
        f"{run.who}, {run.machine}": predicted[run.machine] / run.tokens_per_second - 1
        for run in PUBLISHED
        if run.who == CALIBRATED_ON
    }


def row_of(kind: str, who: str, machine: str, rate: float, model: GPT2Config, note: str) -> dict[str, Any]:
    """One row of the table."""
    hardware = MACHINES[machine]
    peak = hardware.count * perf.DATA_SHEETS[GPUS[hardware.gpu].sheet].half * 1e12
    return {
        "kind": kind,
        "who": who,
        "machine": machine,
        "tokens_per_second": rate,
        "per_gpu": rate / hardware.count,
        "mfu": rate * perf.flops_per_token(model, model.block_size) / peak,
        "epoch_s": EPOCH_TOKENS / rate,
        "note": note,
    }


def benchmark(config: PredictConfig) -> dict[str, Any]:
    """Published, predicted and (if given) measured rows."""
    model = GPT2Config.named("gpt2")
    predicted = predictions(config, model)
    errors = error_on_published(predictions(PredictConfig(), model))  # their batches, whatever is asked for
    worst = max(abs(error) for error in errors.values())
    rows = [
        row_of(run.kind, run.who, run.machine, run.tokens_per_second, model, run.source) for run in PUBLISHED
    ]
    not_shown, own_memory = None, []
    if config.measured is not None:  # before the dry runs, for which a mistake should not wait
        with whole_results(config.measured):
            gpu, measured, not_shown = measured_steps(config.measured, model)
            if not not_shown:
                rows += speed_rows(config, gpu, measured, model)
                own_memory = measured_memory_rows(config, gpu, measured, model)
    note = f"roofline; off by up to {worst:.0%} on {CALIBRATED_ON}'s published runs"
    rows += [
        row_of("predicted", "model, any trainer", name, rate, model, note) for name, rate in predicted.items()
    ]
    return {
        "benchmark": "predict",
        "facts": facts("cpu"),
        "config": asdict(config) | {"measured": str(config.measured) if config.measured else None},
        "rows": rows,
        "model_error": errors,
        "memory": [*own_memory, *memory_rows(model, config.batch_size, quick=config.quick)],
        "not_shown": not_shown,
    }


def memory_rows(model: GPT2Config, batch_size: int, *, quick: bool) -> list[dict[str, Any]]:
    """Predicted bytes of one GPU of each machine, sharded within a node and replicated across nodes."""
    plan = perf.memory_plan(
        model,
        batch_size=batch_size,
        block_size=model.block_size,
        precision="bfloat16",
        loss_chunk_tokens=chunk_tokens_of("cuda", "bfloat16"),
        device_type="cuda",
    )
    alone = {kind: size for kind, size in plan.items() if kind != "total"}
    work = Work(model=model, batch_size=batch_size, compile=False, device="cuda")
    by_layout = {(1, 1): alone}
    rows = []
    for name, machine in MACHINES.items():
        layout = (machine.nodes, machine.count // machine.nodes)
        if quick and layout != (1, 1):
            continue
        if layout not in by_layout:
            by_layout[layout] = dry_run.plan(work, layout).at_peak
        kinds = by_layout[layout]
        note = "by formula" if layout == (1, 1) else "dry run of the eager step"
        rows.append(
            {
                "kind": "predicted",
                "machine": name,
                "replicate": layout[0],
                "shard": layout[1],
                "kinds": kinds,
                "total_bytes": sum(kinds.values()),
                "note": note,
            }
        )
    return rows


def speed_rows(
    config: PredictConfig,
    gpu: str,
    measured: list[dict[str, Any]],
    model: GPT2Config,
) -> list[dict[str, Any]]:
    """The fastest row that was measured on one `gpu`, with the model's error on the same step.

    After it come predictions for several such GPUs, made from this measurement.
    """
    fastest, alone = max(measured, key=lambda row: row["tokens_per_second"]), f"1x {gpu}"
    rate, batch_size = fastest["tokens_per_second"], fastest["work"]["batch_size"]
    tokens = fastest["work"].get("accumulation", 1) * batch_size * model.block_size
    modelled = tokens / step_s(model, MACHINES[alone], total_batch_size=tokens, batch_size=batch_size)
    note = f"{config.measured}; the model is off by {modelled / rate - 1:+.0%}"
    rows = [row_of("measured", "ours", alone, rate, model, note)]
    for name, machine in MACHINES.items():
        if machine.gpu == gpu and machine.count > 1:
            tokens = config.total_batch_size / machine.count
            compute = tokens / rate
            exposed = exposed_s(model, machine, compute, tokens=tokens, batch_size=config.batch_size)
            together = config.total_batch_size / (compute + exposed)
            note = f"the measured {alone}, and a ring whose error is not known"
            rows.append(row_of("predicted", "ours", name, together, model, note))
    return rows


def measured_memory_rows(
    config: PredictConfig,
    gpu: str,
    measured: list[dict[str, Any]],
    model: GPT2Config,
) -> list[dict[str, Any]]:
    """The peak that was measured on one `gpu` for the step that `memory_rows` predicts, with its error."""
    wanted = asdict(Work(model=model, batch_size=config.batch_size, device="cuda"))
    peaks = [
        row["memory"]["steps"]
        for row in measured
        if all(row["work"].get(name, value) == value for name, value in wanted.items())
    ]
    if not peaks:
        return []
    memory = memory_rows(model, config.batch_size, quick=True)
    alone = next(row for row in memory if row["machine"] == f"1x {gpu}")
    note = f"{config.measured}; the formula is off by {alone['total_bytes'] / max(peaks) - 1:+.1%}"
    return [alone | {"kind": "measured", "kinds": {}, "total_bytes": max(peaks), "note": note}]


def measured_steps(path: Path, model: GPT2Config) -> tuple[str, list[dict[str, Any]], str | None]:
    """(the one of GPUS that a result was measured on, our steps of `model` on one such GPU, why none of it
    can be in the table or None)."""
    found = read_json(path)
    results = found.get("results", {found["benchmark"]: found})
    results = {name: results[name] for name in ("throughput", "peers") if "facts" in results.get(name, {})}
    if not results:
        raise UserError(
            f"{path} holds no result of benchmarks.throughput or benchmarks.peers; "
            f"run python -m benchmarks.throughput"
        )
    whose = results.get("throughput", {}).get("contender", "ours")
    if whose != "ours":
        raise UserError(
            f"{path} has the steps of {whose}, expected ours; run python -m benchmarks.throughput without "
            f"--contender"
        )
    rows = results.get("throughput", {}).get("rows", [])
    if "peers" in results:
        rows = [*rows, results["peers"]["contenders"]["ours"] | {"work": results["peers"]["work"]}]
    rows = [
        row
        for row in rows
        if "error" not in row
        and row["work"]["model"] == asdict(model)
        and row["work"].get("precision") != "float32"  # its peak is another
        and row.get("ranks", 1) == 1
    ]
    hardware = next(iter(results.values()))["facts"]["hardware"]
    gpu = next((name for name, gpu in GPUS.items() if gpu.sheet == perf.sheet_key(hardware)), "")
    not_shown = None
    if not gpu:
        not_shown = (
            f"{path} is not in the table: it is of {hardware}, and the model knows {' and '.join(GPUS)}"
        )
    elif not rows:
        what = "GPT-2 124M with 1,024 tokens in half precision on one GPU"
        not_shown = f"{path} is not in the table: it has no step of {what}"
    return gpu, rows, not_shown


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    rows = [
        [
            row["kind"].upper(),
            row["who"],
            row["machine"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['per_gpu']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['epoch_s'] / 3600:.1f}",
            row["note"],
        ]
        for row in result["rows"]
    ]
    header = ["kind", "who", "machine", "tokens/s", "per GPU", "MFU", "hours an epoch", "where from"]
    memory = [
        [
            row["kind"].upper(),
            row["machine"],
            f"{row['replicate']} x {row['shard']}",
            format_bytes(row["total_bytes"]),
            format_bytes(row["kinds"]["activations"]) if row["kinds"] else "",
            row["note"],
        ]
        for row in result["memory"]
    ]
    errors = [f"{run}: {error:+.0%}" for run, error in result["model_error"].items()]
    texts, not_shown = ("who", "machine", "where from"), result.get("not_shown")
    return "\n".join(
        [
            table(header, rows, words=texts),
            *([not_shown] if not_shown else []),
            f"the speed model's error on published runs: {'; '.join(errors)}",
            "",
            f"memory of one GPU at {result['config']['batch_size']} x 1024 in bf16, CUDA's own not counted:",
            table(
                ["kind", "machine", "replicas x shards", "peak", "activations", "where from"],
                memory,
                words=texts,
            ),
            "the dry run's error on what fits a CPU: python -m benchmarks.sharding --dry-run --check",
        ]
    )


def main() -> None:
    with one_line_errors():
        result = benchmark(parse(PredictConfig, default=PredictConfig()))
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
