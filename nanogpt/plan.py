"""The plan of a run, before it starts: what will be trained, on what and at what cost."""

from typing import NamedTuple

from nanogpt import perf
from nanogpt.config import RunConfig
from nanogpt.data import BatchSpec, window_count
from nanogpt.dataset import Dataset
from nanogpt.loss import chunk_tokens_of
from nanogpt.train import Precision
from nanogpt.units import format_bytes, format_seconds


class Plan(NamedTuple):
    """A run's config, and what was found or chosen for it; all of it has been checked."""

    config: RunConfig
    dataset: Dataset
    spec: BatchSpec
    """Its microsteps fit the device."""
    hardware: perf.Hardware
    precision: Precision
    compile: bool
    peak_flops: float
    """FLOP/s of the device in `precision`."""
    peak_source: str
    start: int
    """The step of the checkpoint that the run resumes from; 0 without one."""
    mesh: tuple[int, int] = (1, 1)
    """The number of replicas, and of the processes that each is divided among."""
    optimizer_slots: int = 2
    """How many numbers the optimizer keeps for each parameter; AdamW's are two."""

    @property
    def loss_chunk_tokens(self) -> int:
        """How many tokens' logits exist at a time."""
        return chunk_tokens_of(self.hardware.device.type, self.precision)

    @property
    def last(self) -> int:
        """The step at which this start of the run ends."""
        return self.config.last_step


def plan_text(plan: Plan) -> str:
    """The plan as a table to read, one subject per line."""
    config, spec, dataset, hardware = plan.config, plan.spec, plan.dataset, plan.hardware
    model, max_steps = config.model, config.train.max_steps
    epoch_steps = window_count(len(dataset.train), spec.block_size) / spec.sequences
    memory = perf.memory_plan(
        model,
        batch_size=spec.batch_size,
        block_size=spec.block_size,
        precision=plan.precision,
        loss_chunk_tokens=plan.loss_chunk_tokens,
        accumulation=spec.accumulation,
        optimizer_slots=plan.optimizer_slots,
        shards=plan.mesh[1],
        compile=plan.compile,
        device_type=hardware.device.type,
    )
    kinds = [f"{kind} {format_bytes(size)}" for kind, size in memory.items() if kind != "total" and size]
    flops = perf.flops_per_token(model, spec.block_size)
    floor_s = flops * spec.total_batch_size / (plan.peak_flops * spec.process_count)
    step_floor = f"{floor_s:.3g} s" if floor_s < 60 else format_seconds(floor_s)
    rows = {
        "model": f"{perf.parameter_count(model):,} parameters: {model.n_layer} layers, {model.n_head} heads, "
        f"width {model.n_embd}, {model.block_size} positions, {model.vocab_size:,} tokens",
        "device": f"{hardware.name}, {hardware.cpu_cores} CPU cores, {plan.precision}, "
        + ("compiled" if plan.compile else "eager"),
        "data": f"{dataset.folder}: {len(dataset.train):,} training tokens"
        + (f" ({dataset.note})" if dataset.note else ""),
        "step": f"{spec.total_batch_size:,} tokens = {spec.process_count} device(s) x {spec.accumulation} "
        f"microstep(s) x {spec.batch_size} sequences x {spec.block_size} tokens",
        "epoch": f"{epoch_steps:,.1f} steps; this run is steps {plan.start} to {plan.last} of {max_steps}, "
        f"{max_steps / epoch_steps:,.2f} epochs",
        "memory": f"{format_bytes(memory['total'])} planned of {format_bytes(hardware.available_bytes)} "
        f"free: {', '.join(kinds)}",
        "compute": f"{flops / 1e9:.3g} GFLOP a token; a step is at least {step_floor} and the "
        f"run {format_seconds(floor_s * max(plan.last - plan.start, 0))} at {plan.peak_flops / 1e12:.3g} "
        f"TFLOP/s ({plan.peak_source})",
        "files": f"{config.run_dir}/: config.json, metrics.jsonl, loss.png, checkpoints/",
    }
    if spec.process_count > 1:
        replicas, shards = plan.mesh
        rows["mesh"] = f"{replicas} replica(s) of the state, each divided among {shards} process(es)"
    return "\n".join(f"{name:>8}  {text}" for name, text in rows.items())
