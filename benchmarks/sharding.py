"""`python -m benchmarks.sharding`: what a sharded step costs compared with one process, in time and memory.

It starts its own processes, with gloo, on this machine. One process with all threads and N processes that
share them train on the same global batches, turn by turn in one run. It also measures the state's bytes at
rest, checkpoints, and the memory of a rank: as a dry run predicts it, and in real processes.

`--dry-run` only predicts, for a layout that need not fit here: `--dry-run --model gpt2-xl --shard 8`. With
`--check` the prediction is also measured, by as many real processes as the layout has.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import dry_run
from benchmarks.contenders import Work
from benchmarks.measure import (
    facts,
    finish,
    one_line_errors,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
)
from benchmarks.ranks import Layout, started
from nanogpt import perf
from nanogpt.command import parse
from nanogpt.cores import usable_cores
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config
from nanogpt.units import format_bytes

SMALL = GPT2Config(vocab_size=2048, block_size=256, n_layer=6, n_head=8, n_embd=512)
QUICK = GPT2Config(vocab_size=512, block_size=64, n_layer=2, n_head=2, n_embd=128)
REST_LIMIT, MEMORY_LIMIT = 1.05, 0.10
"""How large a rank's state may be against its share of the whole, and how far off a prediction may be."""
SAME_LOSS = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
"""How far the layouts' losses may differ after the same steps, since sums are taken in another order."""
MEMORY_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Measure a sharded step beside that of one process, or predict its memory."""

    model: Literal["small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "small"
    """A published size; small is 6 blocks of 512 features, 256 tokens and 2,048 words."""
    shard: int = 2
    """Processes that share one copy of the state, at least 1."""
    replicate: int = 1
    """Copies, at least 1; the processes are shard x replicate, at least 2."""
    batch_size: int = 2
    """Sequences in a microstep of one rank, at least 1; one process alone takes those of all."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """What is multiplied in; auto takes the fastest that trains here (for a dry run alone: bfloat16)."""
    compile: bool = True
    """Compile the steps that are timed; memory is predicted and measured for the eager one."""
    turns: int = 10
    """Turns of one step, at least 2."""
    saves: int = 3
    """Checkpoints, at least 2; one more comes first."""
    dry_run: bool = False
    """Predict the memory of a rank, of GPUs unless --check, and do nothing else."""
    check: bool = False
    """With --dry-run: also measure it with real processes."""
    quick: bool = False
    """A model of two tiny layers, run eagerly, to see that everything works."""

    def __post_init__(self) -> None:
        if min(self.shard, self.replicate, self.batch_size) < 1 or self.processes < 2:
            raise UserError(
                f"{self.replicate} copies x {self.shard} shards with {self.batch_size} sequences each, "
                f"expected at least 2 processes and 1 sequence; set --replicate, --shard and --batch-size"
            )
        if min(self.turns, self.saves) < 2:
            raise UserError(
                f"{self.turns} turns and {self.saves} saves, expected at least 2; set --turns and --saves"
            )
        if self.check and not self.dry_run:
            raise UserError("--check without --dry-run, expected both or none: a full run checks in any case")

    @property
    def processes(self) -> int:
        return self.shard * self.replicate


def work_of(config: ShardingConfig) -> Work:
    """What one rank of the layout does in a step."""
    models = {"small": QUICK if config.quick else SMALL}
    model = models.get(config.model) or GPT2Config.named(config.model)
    device, fastest = "cpu", perf.default_precision(perf.detect(torch.device("cpu")))
    if config.dry_run and not config.check:
        device, fastest = "cuda", "bfloat16"
    return Work(
        model=model,
        batch_size=config.batch_size,
        precision=fastest if config.precision == "auto" else config.precision,
        compile=config.compile and not config.quick,
        device=device,
    )


def compare_steps(config: ShardingConfig, work: Work) -> dict[str, Any]:
    """Step times of one process and of the layout in turns, the state at rest, and checkpoints."""
    cores = usable_cores()
    alone = Layout(work=replace(work, batch_size=config.processes * work.batch_size), threads=cores)
    sharded = Layout(
        work=work,
        shard=config.shard,
        replicate=config.replicate,
        threads=max(cores // config.processes, 1),
    )
    seconds: dict[str, list[float]] = {"alone": [], "sharded": []}
    with (
        started(alone) as one,
        started(sharded) as job,
        tempfile.TemporaryDirectory(prefix="nanogpt-checkpoint-") as folder,
    ):
        jobs = {"alone": one, "sharded": job}
        first_s = {name: max(each.ask("start")) for name, each in jobs.items()}
        for number in range(3 if config.quick else config.turns):
            for name in sorted(jobs, reverse=number % 2 == 1):  # neither always follows the other
                seconds[name].append(max(turn[0] for turn in jobs[name].ask("turn", 1)))
            say(f"turn {number + 1}: " + ", ".join(f"{name} {seconds[name][-1]:.3f} s" for name in jobs))
        losses = {name: each.ask("last_loss")[0] for name, each in jobs.items()}
        check_same_loss(losses, work)
        (whole,), rest = one.ask("bytes_at_rest"), job.ask("bytes_at_rest")
        saves = job.ask("saves", Path(folder), 2 if config.quick else config.saves)
    ratios = [b / a for a, b in zip(seconds["alone"], seconds["sharded"], strict=True)]
    blocks, on_disk = ([max(at) for at in zip(*times, strict=True)] for times in _columns(saves))
    step_s = spread(seconds["sharded"]).median
    return {
        "threads": {"alone": alone.threads, "sharded": sharded.threads},
        "seconds": seconds,
        "step_s": {name: spread(times)._asdict() for name, times in seconds.items()},
        "sharded_over_alone": spread(ratios)._asdict(),
        "first_step_s": first_s,
        "loss": losses,
        "rest": {"whole_bytes": whole, "rank_bytes": rest, "of_share": max(rest) * config.shard / whole},
        "checkpoint": {
            "blocks_s": spread(blocks)._asdict(),
            "on_disk_s": spread(on_disk)._asdict(),
            "blocks_steps": max(blocks) / step_s,
        },
    }


def _columns(saves: list[list[Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds by rank and checkpoint: until `save` returned, and until it was on disk."""
    return (
        [[save.blocks_s for save in of_rank] for of_rank in saves],
        [[save.on_disk_s for save in of_rank] for of_rank in saves],
    )


def check_same_loss(losses: dict[str, float], work: Work) -> None:
    """Raises AssertionError if the layouts did not do the same work."""
    apart = abs(losses["sharded"] / losses["alone"] - 1)
    assert apart < SAME_LOSS[work.precision], f"losses after the same steps are {losses}"


def memory_of(config: ShardingConfig, work: Work, *, measured: bool) -> list[dict[str, Any]]:
    """A rank's memory with and without resharding after forward: predicted, and measured if wanted."""
    rows, work = [], replace(work, compile=False)
    for reshard in (False, True):
        layout = Layout(
            work=work, shard=config.shard, replicate=config.replicate, reshard_after_forward=reshard
        )
        plan = dry_run.plan(work, (config.replicate, config.shard), reshard_after_forward=reshard)
        row = {
            "reshard_after_forward": reshard,
            "rest": plan.rest,
            "at_peak": plan.at_peak,
            "peak_of_kind": plan.peak_of_kind,
            "predicted_bytes": plan.peak_bytes,
        }
        if measured:
            with started(layout, exact_malloc=True) as job:
                peaks = [resident.peak for resident in job.ask("resident", MEMORY_STEPS)]
            row |= {"measured_bytes": peaks, "error": plan.peak_bytes / max(peaks) - 1}
        rows.append(row)
        say(f"reshard_after_forward {reshard}: {format_bytes(plan.peak_bytes)} predicted")
    return rows


def benchmark(config: ShardingConfig) -> dict[str, Any]:
    """What was asked for: steps, rest and checkpoints unless it is a dry run, and memory."""
    work = work_of(config)
    result = {
        "benchmark": "sharding",
        "facts": facts("cpu"),
        "layout": {"replicate": config.replicate, "shard": config.shard},
        "work": asdict(work),
    }
    if not config.dry_run:
        result |= compare_steps(config, work)
    # The quick model's memory is less than what any process's memory varies by itself.
    measured = config.check or not (config.dry_run or config.quick)
    return result | {"memory": memory_of(config, work, measured=measured)}


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    work, layout = result["work"], result["layout"]
    model = work["model"]
    head = (
        f"{layout['replicate']} replicas x {layout['shard']} shards, {model['n_layer']} x {model['n_embd']}, "
        f"{work['batch_size']} x {model['block_size']} tokens a rank and microstep, {work['precision']}"
        + ("" if work["device"] == "cpu" else " on GPUs")
    )
    tables = [steps_table(result)] if "step_s" in result else []
    return "\n\n".join([head, *tables, memory_table(result)])


def steps_table(result: dict[str, Any]) -> str:
    """Measured: steps, rest, checkpoints."""
    processes = result["layout"]["replicate"] * result["layout"]["shard"]
    names = {
        "alone": f"step, 1 process x {result['threads']['alone']} threads",
        "sharded": f"step, {processes} processes x {result['threads']['sharded']} threads",
    }
    times = {names[name]: times for name, times in result["step_s"].items()}
    checkpoint, rest = result["checkpoint"], result["rest"]
    times |= {
        "checkpoint, run waits": checkpoint["blocks_s"],
        "checkpoint, until on disk": checkpoint["on_disk_s"],
    }
    rows = [
        [name, *(f"{values[key]:.4f}" for key in ("median", "min", "max"))] for name, values in times.items()
    ]
    ratio, blocks, share = result["sharded_over_alone"], checkpoint["blocks_steps"], rest["of_share"]
    return "\n".join(
        [
            table(["measured", "median s", "min s", "max s"], rows),
            f"a sharded step takes {ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f}) times "
            f"that of one process",
            f"the longest wait for a checkpoint is {blocks:.2f} steps: "
            f"{'less' if blocks < 1 else 'NOT less'} than one",
            f"state at rest, largest rank: {format_bytes(max(rest['rank_bytes']))} of "
            f"{format_bytes(rest['whole_bytes'])}, {share:.4f} of its share: "
            f"{'within' if share <= REST_LIMIT else 'NOT within'} {REST_LIMIT}",
        ]
    )


def memory_table(result: dict[str, Any]) -> str:
    """Predicted memory by kind, with and without resharding after forward; then what was measured."""
    kept, resharded = result["memory"]
    kinds = [kind for kind, size in kept["peak_of_kind"].items() if size]

    def cells(kind: str) -> list[str]:
        sizes = [kept["rest"], kept["at_peak"], kept["peak_of_kind"]]
        sizes += [resharded["at_peak"], resharded["peak_of_kind"]]
        return [kind, *(format_bytes(of_kind.get(kind, 0)) for of_kind in sizes)]

    total = ["all", format_bytes(sum(kept["rest"].values())), format_bytes(kept["predicted_bytes"]), ""]
    total += [format_bytes(resharded["predicted_bytes"]), ""]
    header = ["PREDICTED memory of a rank", "at rest", "at the peak", "most of the kind"]
    header += ["resharded: at the peak", "most of the kind"]
    lines = [table(header, [*map(cells, kinds), total])]
    for row in result["memory"]:
        if "error" in row:
            how = "resharded after forward" if row["reshard_after_forward"] else "kept after forward"
            verdict = "within" if abs(row["error"]) <= MEMORY_LIMIT else "NOT within"
            lines.append(
                f"peak, {how}: PREDICTED {format_bytes(row['predicted_bytes'])}, MEASURED "
                f"{format_bytes(max(row['measured_bytes']))} (growth of the largest rank's resident memory "
                f"over {MEMORY_STEPS} eager steps), off by {row['error']:+.1%}: {verdict} {MEMORY_LIMIT:.0%}"
            )
    return "\n".join(lines)


def main() -> None:
    with one_line_errors():
        config = parse(ShardingConfig, default=ShardingConfig())
        say_what_quick_leaves_out(config, "turns", "saves")
        result = benchmark(config)
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
