"""A run from its config to its last checkpoint: everything that is checked and set up around the loop.

Whatever can be wrong with a config, a folder or a device is found before the first step is compiled.
"""

import contextlib
import ctypes
import dataclasses
import errno
import gc
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nanogpt import command, doctor, optim, perf, sharding, tree
from nanogpt.checkpoint import CHECKPOINTS, Checkpointer, appears, load_params
from nanogpt.config import RunConfig
from nanogpt.data import BatchSpec
from nanogpt.dataset import open_dataset
from nanogpt.errors import UserError
from nanogpt.loop import Interrupted, Loop, RunResult, catch_signals
from nanogpt.loss import chunk_tokens_of
from nanogpt.meeting import ALONE, World, restart_count, world
from nanogpt.model import GPT2Config
from nanogpt.plan import Plan, plan_text
from nanogpt.processes import Team, code_hashes
from nanogpt.run_dir import METRICS, PICTURE, describe, own_run_dir, starting_step, to_json
from nanogpt.tracker import Console, JsonLines, Trackers, WandB
from nanogpt.train import Precision, TrainState, init_state
from nanogpt.units import format_bytes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
LOGS = "logs"
BATCH_BYTES_PER_TOKEN = 40
"""Of a step's batch: inputs and targets of 8 bytes each, beside those of the next one and the rows they are
cut from."""


def main(default: RunConfig) -> RunResult | None:
    """The command line of an experiment: runs `default` as changed by flags and returns what `run` returns.

    Exit status 2, with one sentence on stderr, means a user's mistake; 128 + its number a signal, after a
    checkpoint; 1 a lost rank. Each ends all ranks that torchrun has started.
    """
    with command.mistakes_in_a_sentence(), Team(world()) as team:
        config = team.together(lambda: shaped(command.parse(RunConfig, default=default), default))
        try:
            return run(config, team)
        except Interrupted as stop:
            sys.exit(128 + stop.signal)


def shaped(config: RunConfig, default: RunConfig) -> RunConfig:
    """`config` with the shape of the model that it starts from, unless a --model flag asks for another."""
    model = None if config.init.run_dir is None else saved_model(config.init.run_dir)
    if model is None or config.model != default.model:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, dropout=config.model.dropout))


def saved_model(run_dir: Path) -> GPT2Config | None:
    """The model whose parameters a run has saved; None if it has saved none."""
    checkpointer = Checkpointer(run_dir / CHECKPOINTS)
    latest = checkpointer.latest()
    return None if latest is None else GPT2Config(**checkpointer.metadata(latest)["config"]["model"])


def run(config: RunConfig, team: Team | None = None) -> RunResult | None:
    """Trains as `config` says and returns how it ended; None if only the plan was asked for.

    Raises UserError for whatever the user can put right, if possible before anything is compiled or
    overwritten, and Interrupted after a signal, with a checkpoint saved.
    """
    team = team or Team(ALONE)
    if team.world.size == 1:
        return run_here(config, team)
    device = team.together(lambda: choose_device(config.train.device, team.world))
    output = contextlib.nullcontext() if config.plan else team.rank_output(config.run_dir / LOGS)
    with output, team.connected(device.type, timeout_s=config.mesh.timeout_s):
        team.agree(code_hashes() | settings_of(config))
        if not config.plan:
            team.together(lambda: check_shared(config.run_dir, team.world))
        for finding in doctor.preflight(team, device.type, config.run_dir):
            print(f"{finding.level}: {finding.subject}: {finding.text}")
        return run_here(config, team)


def check_shared(run_dir: Path, world: World) -> None:
    """Raises UserError, on rank 0, unless it sees the log of every other rank: that their machines share the
    folder, which only the first checkpoint would notice."""
    for rank in range(1, world.size if world.rank == 0 else 0):
        log = run_dir / LOGS / f"rank-{rank}.log"
        if not appears(log):
            raise UserError(
                f"{log} of rank {rank} is not to be seen here, expected that all ranks see the same "
                f"{run_dir}, where each writes its part of a checkpoint; choose a --run-dir that their "
                "machines share"
            )


def run_here(config: RunConfig, team: Team) -> RunResult | None:
    """This process's part of the run, once it is connected to the others, if there are any."""
    config = of_this_attempt(config, team)
    checkpointer = Checkpointer(config.run_dir / CHECKPOINTS, keep=config.checkpoint.keep)
    console = Console(config.last_step)
    plan = make_plan(config, checkpointer, console, team)
    if not (config.plan and team.world.rank):
        console.message(plan_text(plan))
    if config.plan:
        return None
    if plan.start >= plan.last:
        console.message(
            f"nothing to do: {config.run_dir} is at step {plan.start}, and this run ends at step "
            f"{plan.last}; see its {PICTURE}, or write text with "
            f'python -m nanogpt.sample --run-dir {shlex.quote(str(config.run_dir))} --prompt "..."'
        )
        return RunResult(None, plan.start, None, None, config.run_dir)
    if plan.hardware.device.type == "cpu":
        keep_freed_memory()
    if plan.hardware.device.type == "cuda":
        torch.cuda.set_device(plan.hardware.device)  # code that names no device means this one
    mesh = sharding.make_mesh(plan.hardware.device.type, plan.mesh) if plan.spec.process_count > 1 else None
    optimizer = make_optimizer(config, plan.precision)
    state = starting_state(plan, optimizer, checkpointer, mesh)
    checkpointer.check(state)
    is_first = team.world.rank == 0
    about = describe(config, plan.dataset, plan.precision)
    with (
        own_run_dir(config, about) if is_first else contextlib.nullcontext(),
        lost_disk_in_a_sentence(config.run_dir),
        contextlib.closing(make_trackers(plan, console) if is_first else Trackers(console)) as trackers,
        catch_signals() as caught,  # also while the last checkpoint is written
        contextlib.closing(checkpointer),
        team.hangs_explained(),  # innermost: after a rank is lost, torchrun soon ends this one too
    ):
        schedule = make_schedule(config)
        loop = Loop(plan, optimizer, schedule, checkpointer, trackers, console, team, mesh)
        while True:
            try:
                return loop.run(state, caught)
            except torch.OutOfMemoryError as error:
                spec = smaller_microsteps(loop.plan.spec, steps_done=loop.step - plan.start, error=error)
            console.message(
                f"{plan.hardware.name} ran out of memory with {loop.plan.spec.batch_size} sequences in a "
                f"microstep: {spec.batch_size} at a time and {spec.accumulation} microsteps from here on"
            )
            loop.plan = plan._replace(spec=spec)
            del state  # it may be half overwritten
            gc.collect()  # a failed eager backward pass leaves reference cycles through torch.func's wrappers
            torch.cuda.empty_cache()
            state = starting_state(plan, optimizer, checkpointer, mesh)


def of_this_attempt(config: RunConfig, team: Team) -> RunConfig:
    """`config`, but a run that torchrun has restarted may resume itself, even with `--resume never`."""
    if config.resume == "never" and any(map(int, team.gather(str(restart_count())))):
        return dataclasses.replace(config, resume="auto")
    return config


def make_plan(config: RunConfig, checkpointer: Checkpointer, console: Console, team: Team) -> Plan:
    """What `config` amounts to on this machine; says what had to change. Raises UserError, on all ranks if on
    one, for what cannot run."""
    hardware = perf.detect(choose_device(config.train.device, team.world))
    if hardware.device.type == "cpu":  # the processes of a machine share it
        hardware = hardware._replace(available_bytes=hardware.available_bytes // team.world.local_size)
    precision = config.train.precision or saved_precision(checkpointer) or perf.default_precision(hardware)
    check_attention(config, hardware.device.type, precision)
    shape = sharding.mesh_shape(
        shard=config.mesh.shard,
        replicate=config.mesh.replicate,
        size=team.world.size,
        local_size=team.world.local_size,
    )
    dataset = team.together(lambda: open_dataset(config))
    team.agree({"the data": dataset.hash, "the precision of this device": precision})
    start = starting_step(config, dataset, checkpointer)
    if not start and config.init.run_dir is not None:
        check_start(config, config.init.run_dir)
    compile = config.train.compile and can_compile(hardware.device, console)
    wanted = team.together(lambda: batch_spec(config, team.world))
    team.together(lambda: require_room_for_batches(wanted, team.world))
    spec = team.together(lambda: fit(config, wanted, hardware, precision, shards=shape[1], compile=compile))
    sizes = [int(size) for size in team.gather(str(spec.batch_size))]  # the smallest device decides
    spec = dataclasses.replace(spec, batch_size=min(sizes))
    if spec != wanted:
        console.message(cut_in_words(wanted, spec, hardware.name))
    peak_flops, source = perf.peak_flops(hardware, precision)
    slots = optimizer_slots(config, precision)
    return Plan(config, dataset, spec, hardware, precision, compile, peak_flops, source, start, shape, slots)


def check_attention(config: RunConfig, device_type: str, precision: Precision) -> None:
    """Raises UserError if --train.attention names a kernel that device, precision or dropout rule out."""
    kernel = config.train.attention
    if device_type == "cpu" and kernel in ("cudnn", "efficient"):
        raise UserError(
            f"a CPU has no {kernel} attention, expected auto, flash or math; set --train.attention"
        )
    if device_type == "cuda" and kernel in ("cudnn", "flash") and precision == "float32":
        raise UserError(
            f"{kernel} attention has no float32, expected auto, efficient or math; set --train.attention or "
            "--train.precision"
        )
    if config.model.dropout and kernel not in ("auto", "math"):
        raise UserError(
            f"{kernel} attention has no dropout and --model.dropout is {config.model.dropout}, expected auto "
            "or math; set --train.attention"
        )


def saved_precision(checkpointer: Checkpointer) -> Precision | None:
    """The precision of the run so far, on whatever device; None if it has saved nothing."""
    latest = checkpointer.latest()
    return None if latest is None else checkpointer.metadata(latest).get("precision")


def check_start(config: RunConfig, init_dir: Path) -> None:
    """Raises UserError unless `init_dir` holds a saved model with the shape of `config`."""
    model = saved_model(init_dir)
    if model is None:
        raise UserError(f"{init_dir} holds no checkpoint to start from; choose another --init.run-dir")
    for name, saved in dataclasses.asdict(model).items():
        wanted = getattr(config.model, name)
        if name != "dropout" and saved != wanted:
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"{init_dir} holds a model with {flag} {saved}, now {wanted}; repeat its flag or choose "
                f"another --init.run-dir"
            )


def settings_of(config: RunConfig) -> dict[str, str]:
    """The flags on which all ranks have to agree; only the data's path may differ between machines."""
    values = to_json(config)
    values["data"].pop("path")
    flags = {
        f"{group}.{name}" if isinstance(value, dict) else group: inner
        for group, value in values.items()
        for name, inner in (value.items() if isinstance(value, dict) else [("", value)])
    }
    return {f"--{name.replace('_', '-')}": json.dumps(value) for name, value in flags.items()}


def make_schedule(config: RunConfig) -> optim.Schedule:
    """The learning rate by step."""
    return optim.warmup_cosine(
        config.optim.max_learning_rate,
        final=config.optim.min_learning_rate,
        warmup_steps=config.optim.warmup_steps,
        total_steps=config.train.max_steps,
    )


def make_optimizer(config: RunConfig, precision: Precision) -> optim.Transform:
    """Clip, then AdamW; scaled for float16."""
    b1, b2 = config.optim.betas
    transform = optim.chain(
        optim.clip_by_global_norm(config.optim.gradient_clip_norm),
        optim.adamw(make_schedule(config), b1=b1, b2=b2, weight_decay=config.optim.weight_decay),
    )
    return optim.dynamic_loss_scale(transform) if precision == "float16" else transform


def optimizer_slots(config: RunConfig, precision: Precision) -> int:
    """How many numbers the optimizer keeps for each parameter, rounded up; counts of steps are none."""
    # Of one block, since all are alike, and so that a model too large for any machine is not built here.
    params = dict(dataclasses.replace(config.model, n_layer=1).skeleton.named_parameters())
    leaves = tree.leaves(make_optimizer(config, precision).init(params))
    kept = sum(leaf.numel() for leaf in leaves if leaf.ndim)
    return math.ceil(kept / sum(leaf.numel() for leaf in params.values()))


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next allocation, if it can (glibc).

    Otherwise it returns every large tensor's pages, and the kernel clears new ones for the next tensor: an
    eager step of a large model loses a third of its time to that.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # An older glibc accepts 32 MiB at most. It needs some value: the call below alone would make malloc
        # return even more.
        if not libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1):
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def choose_device(name: str | None, place: World) -> torch.device:
    """The device called `name`, by default the GPU if there is one; each of several processes has its own.

    Raises UserError if this machine has no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{place.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"no device is called {name!r}, expected cuda, cpu or mps; set --train.device"
        ) from error
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= counts.get(device.type, 0):
        here = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise UserError(f"no device {name} on this machine, expected one of {here}; set --train.device")
    return device


def can_compile(device: torch.device, console: Console) -> bool:
    """Whether the compiler that torch.compile calls is installed; says so if it is not."""
    if device.type == "cuda":  # Triton builds its launchers in C
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if any(map(shutil.which, names)):
        return True
    console.message(f"no compiler found ({' or '.join(names)}): running eagerly, as with --train.no-compile")
    return False


def batch_spec(config: RunConfig, place: World) -> BatchSpec:
    """How the steps of `config` are cut. Raises UserError if the total batch does not divide."""
    return BatchSpec(
        block_size=config.model.block_size,
        batch_size=config.data.batch_size,
        total_batch_size=config.data.total_batch_size,
        seed=config.train.seed,
        process_index=place.rank,
        process_count=place.size,
    )


def require_room_for_batches(spec: BatchSpec, place: World) -> None:
    """Raises UserError unless this machine's memory holds a step's tokens, and the next ones being read."""
    need = BATCH_BYTES_PER_TOKEN * spec.total_batch_size // spec.process_count
    free = perf.host_memory()[1] // place.local_size
    if need > free:
        raise UserError(
            f"the tokens of a step, {spec.total_batch_size:,}, need {format_bytes(need)} of this machine's "
            f"memory, expected at most the {format_bytes(free)} that is free; set a smaller "
            f"--data.total-batch-size"
        )


def fit(
    config: RunConfig,
    spec: BatchSpec,
    hardware: perf.Hardware,
    precision: Precision,
    *,
    shards: int = 1,
    compile: bool = True,
) -> BatchSpec:
    """`spec` with microsteps that fit the device's free memory, and as many tokens per step."""
    batch_size = perf.fit_batch_size(
        config.model,
        batch_size=spec.batch_size,
        block_size=spec.block_size,
        precision=precision,
        loss_chunk_tokens=chunk_tokens_of(hardware.device.type, precision),
        available_bytes=hardware.available_bytes,
        accumulation=spec.accumulation,
        optimizer_slots=optimizer_slots(config, precision),
        shards=shards,
        compile=compile,
        device_type=hardware.device.type,
    )
    return dataclasses.replace(spec, batch_size=batch_size)


def cut_in_words(wanted: BatchSpec, cut: BatchSpec, device: str) -> str:
    """The line that says how the step was cut to fit the memory."""
    return (
        f"{wanted.batch_size} sequences in a microstep do not fit {device}: {cut.batch_size} at a time and "
        f"{cut.accumulation} microsteps instead of {wanted.accumulation}"
    )


def smaller_microsteps(spec: BatchSpec, *, steps_done: int, error: Exception) -> BatchSpec:
    """`spec` with half the sequences per microstep (or the largest divisor below), as many tokens per step.

    Raises UserError from `error` if there is nothing to divide; after the first step, which needs no less
    memory than later ones, so that something else must be taking it; and on one of several processes, since
    the others are in the middle of the step.
    """
    size = spec.batch_size
    if steps_done or size == 1 or spec.process_count > 1:
        raise UserError(
            f"out of memory after {steps_done} steps with {size} sequences in a microstep; free memory or "
            f"set a smaller {'--data.batch-size' if size > 1 else '--model.*'}, and start the same command "
            "again"
        ) from error
    smaller = next(part for part in range(size // 2, 0, -1) if size % part == 0)
    return dataclasses.replace(spec, batch_size=smaller)


def starting_state(
    plan: Plan, optimizer: optim.Transform, checkpointer: Checkpointer, mesh: sharding.DeviceMesh | None
) -> TrainState:
    """The state that the run starts from: its own checkpoint, another run's parameters, or a fresh one."""
    config, device = plan.config, plan.hardware.device
    generator = torch.Generator(device).manual_seed(config.train.seed)
    state = init_state(config.model, optimizer, generator, mesh=mesh)
    if plan.start:
        return checkpointer.restore(plan.start, like=state)
    if config.init.run_dir is None:
        return state
    params, _ = load_params(config.init.run_dir / CHECKPOINTS)
    own = {name: params[name].to(device) for name in state.params}
    return state._replace(params=own if mesh is None else tree.map(lambda p: sharding.place(p, mesh), own))


def make_trackers(plan: Plan, console: Console) -> Trackers:
    """Everything that the run reports to."""
    config = plan.config
    lines = JsonLines(config.run_dir / METRICS, from_step=plan.start)
    wandb = WandB(
        config.track.wandb,
        directory=config.run_dir,
        config=to_json(config),
        from_step=plan.start,
        say=console.message,
        project=config.track.project,
    )
    return Trackers(console, lines, wandb)


@contextlib.contextmanager
def lost_disk_in_a_sentence(run_dir: Path) -> Iterator[None]:
    """Raises UserError if there is no room left for what a run writes, or its directory cannot be used."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no more room to write in {run_dir} ({error.strerror}); free some and start the same "
                f"command again, which goes on from the last checkpoint"
            ) from error
        lost = Path(os.fsdecode(error.filename or "")).absolute()
        if run_dir.absolute() not in lost.parents:
            raise
        raise UserError(
            f"{error.filename} cannot be used any more ({error.strerror}), expected {run_dir} to stay where "
            f"it is and writable while a run trains in it; see to that and start the same command again, "
            f"which goes on from the last checkpoint there"
        ) from error
