"""A run from its config to its last checkpoint: the loop, and every side effect.

Everything that can be wrong with a config, a folder or a device is found before the first step is compiled.
"""

import contextlib
import ctypes
import dataclasses
import errno
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt import command, optim, perf, tree
from nanogpt.checkpoint import Checkpointer, load_params
from nanogpt.config import RunConfig
from nanogpt.data import Batch, BatchSpec, batch_at, prefetch
from nanogpt.dataset import open_dataset
from nanogpt.errors import UserError
from nanogpt.evals import validation_batches, validation_loss
from nanogpt.loss import DEFAULT_CHUNK_TOKENS
from nanogpt.plan import Plan, plan_text
from nanogpt.plot import draw_loss
from nanogpt.run_dir import CHECKPOINTS, METRICS, PICTURE, describe, make_run_dir, starting_step, to_json
from nanogpt.sample import generate, text_of
from nanogpt.tracker import Console, JsonLines, Tracker, Trackers, WandB
from nanogpt.train import Metrics, Precision, TrainState, init_state, make_eval_step, make_train_step

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h


class RunResult(NamedTuple):
    """How a run ended."""

    state: TrainState | None
    """The last state; None where the run was finished before."""
    step: int
    loss: float | None
    val_loss: float | None
    run_dir: Path


def main(default: RunConfig) -> RunResult | None:
    """The command line of an experiment: runs `default` as flags change it and returns what `run` does.

    A user's mistake ends in one sentence on stderr and status 2; a signal, after a checkpoint, in 128 + its
    number.
    """
    with command.mistakes_in_a_sentence():
        try:
            return run(command.parse(RunConfig, default=default))
        except Interrupted as stop:
            sys.exit(128 + stop.signal)


def run(config: RunConfig) -> RunResult | None:
    """Trains as `config` says and returns how it ended; None where only the plan was asked for.

    Raises UserError for whatever the user can put right, before anything is compiled or overwritten where it
    can be known by then, and Interrupted after a signal, with a checkpoint saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this run was started on several processes, expected one; sharding is not built yet")
    checkpointer = Checkpointer(config.run_dir / CHECKPOINTS, keep=config.checkpoint.keep)
    console = Console(config.last_step)
    plan = make_plan(config, checkpointer, console)
    console.message(plan_text(plan))
    if config.plan:
        return None
    if plan.start >= plan.last:
        console.message(
            f"nothing to do: {config.run_dir} is at step {plan.start} of {plan.last}; see its {PICTURE}, or "
            "write text "
            f'with python -m nanogpt.sample --run-dir {config.run_dir} --prompt "..."'
        )
        return RunResult(None, plan.start, None, None, config.run_dir)
    if plan.hardware.device.type == "cpu":
        keep_freed_memory()
    optimizer = make_optimizer(config, plan.precision)
    state = starting_state(plan, optimizer, checkpointer)
    checkpointer.check(state)
    make_run_dir(config, describe(config, plan.dataset, plan.precision))
    trackers = make_trackers(plan, console)
    loop = Loop(plan, optimizer, checkpointer, trackers, console)
    with (
        full_disk_in_a_sentence(config.run_dir),
        contextlib.closing(trackers),
        contextlib.closing(checkpointer),
        catch_signals() as caught,
    ):
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
            del state  # what it holds may be half overwritten
            torch.cuda.empty_cache()
            state = starting_state(plan, optimizer, checkpointer)


def make_plan(config: RunConfig, checkpointer: Checkpointer, console: Console) -> Plan:
    """What `config` comes to on this machine; says what it changes. Raises UserError for what cannot be
    run."""
    device = choose_device(config.train.device)
    hardware = perf.detect(device)
    precision = config.train.precision or perf.default_precision(hardware)
    dataset = open_dataset(config)
    start = starting_step(config, dataset, checkpointer)
    spec = fit(config, batch_spec(config), hardware, precision, console)
    compile = config.train.compile and can_compile(device, console)
    peak_flops, source = perf.peak_flops(hardware, precision)
    return Plan(config, dataset, spec, hardware, precision, compile, peak_flops, source, start)


class Interrupted(Exception):
    """A signal asked the run to stop; the state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@dataclasses.dataclass
class Loop:
    """The steps of a run, and what happens between them."""

    plan: Plan
    optimizer: optim.Transform
    checkpointer: Checkpointer
    trackers: Tracker
    console: Console
    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    evaluated_at: int | None = None

    def run(self, state: TrainState, caught: Sequence[int]) -> RunResult:
        """The planned steps from `state` on; a signal's number in `caught` ends them after the one at hand,
        saved."""
        plan, config = self.plan, self.plan.config
        choices: dict[str, Any] = dict(
            precision=plan.precision, attention=config.train.attention, compile=plan.compile
        )
        train_step = make_train_step(
            config.model, self.optimizer, seed=config.train.seed, donate=True, **choices
        )
        self.eval_step = make_eval_step(config.model, **choices)
        self.schedule = make_schedule(config)
        self.step, pending = plan.start, None
        runs_ahead = plan.hardware.device.type == "cuda"  # elsewhere a step has ended when its call returns
        self.read_at = time.perf_counter()
        with contextlib.closing(self.batches()) as batches:
            for batch in batches:
                state, metrics = train_step(state, batch)
                reading = copy_to_host(metrics)
                if pending is not None:  # the step before: its numbers are here while this one still runs
                    self.report(self.step, pending())
                self.step, pending = self.step + 1, reading
                is_last = bool(caught) or self.step == plan.last  # asked once: a later signal waits a step
                if not runs_ahead or is_last or self.is_due():
                    self.report(self.step, pending())
                    pending = None
                if is_last or self.is_due():
                    self.between_steps(state, is_last=is_last)
                if is_last and self.step < plan.last:
                    self.stop(caught[0])
        return RunResult(state, self.step, self.loss, self.val_loss, config.run_dir)

    def batches(self) -> Generator[Batch, None, None]:
        """The batches of the planned steps, on the device."""
        plan = self.plan
        return prefetch(
            lambda step: batch_at(plan.dataset.train, step, plan.spec),
            range(plan.start, plan.last),
            plan.hardware.device,
        )

    def is_due(self) -> bool:
        """Whether anything but training is to be done after this step."""
        groups = (self.plan.config.eval, self.plan.config.checkpoint, self.plan.config.sample)
        return any(falls_on(group.interval, self.step) for group in groups)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Logs a step's numbers; raises UserError where they show that the parameters are lost."""
        now = time.perf_counter()
        seconds, self.read_at = now - self.read_at, now
        self.loss = metrics["loss"]
        tokens_per_second = self.plan.spec.total_batch_size / seconds
        flops = tokens_per_second * perf.flops_per_token(self.plan.config.model, self.plan.spec.block_size)
        self.trackers.log(
            {
                "step": step,
                "loss": self.loss,
                "learning_rate": float(self.schedule(torch.tensor(step - 1))),
                "grad_norm": metrics["grad_norm"],
                "tokens_per_second": tokens_per_second,
                "mfu": flops / self.plan.peak_flops,
                "seconds": seconds,
            }
        )
        check_finite(self.plan.config, step, metrics, self.plan.precision)

    def between_steps(self, state: TrainState, *, is_last: bool) -> None:
        """Evaluation, sample, checkpoint and picture, whichever fall on this step; all of them at the run's
        end."""
        is_end = self.step == self.plan.config.train.max_steps
        if is_end or falls_on(self.plan.config.eval.interval, self.step):
            self.evaluate(state)
        if is_end or falls_on(self.plan.config.sample.interval, self.step):
            self.write_sample(state)
        if is_last or falls_on(self.plan.config.checkpoint.interval, self.step):
            about = describe(self.plan.config, self.plan.dataset, self.plan.precision)
            fresh = self.val_loss if self.evaluated_at == self.step else None
            self.checkpointer.save(self.step, state, metadata=about, val_loss=fresh)
            run_dir = self.plan.config.run_dir
            draw_loss(run_dir / METRICS, run_dir / PICTURE, title=run_dir.name)
        self.read_at = time.perf_counter()  # tokens per second are of training alone

    def evaluate(self, state: TrainState) -> None:
        """Logs the loss on the validation text."""
        batches = validation_batches(
            self.plan.dataset.val,
            token_count=self.plan.config.eval.tokens,
            batch_size=self.plan.spec.batch_size,
            block_size=self.plan.spec.block_size,
            device=self.plan.hardware.device,
        )
        self.val_loss = validation_loss(self.eval_step, state.params, batches)
        self.evaluated_at = self.step
        self.trackers.log({"step": self.step, "val_loss": self.val_loss})

    def write_sample(self, state: TrainState) -> None:
        """Logs a text that the model writes, the same draw for the same (seed, step)."""
        tokenizer, settings, device = (
            self.plan.dataset.tokenizer,
            self.plan.config.sample,
            self.plan.hardware.device,
        )
        if tokenizer is None:
            return
        tokens = generate(
            state.params,
            self.plan.config.model,
            torch.tensor([tokenizer.encode(settings.prompt)], device=device),
            max_new_tokens=settings.tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            generator=torch.Generator(device).manual_seed(self.plan.config.train.seed + self.step),
        )
        self.trackers.log({"step": self.step, "sample": text_of(tokens[0], tokenizer)})

    def stop(self, number: int) -> None:
        """Ends a run that a signal interrupted, once its checkpoint is whole."""
        self.checkpointer.wait()
        self.console.message(f"stopped at step {self.step}, saved; the same command goes on from there")
        raise Interrupted(number)


def check_finite(config: RunConfig, step: int, metrics: dict[str, float], precision: Precision) -> None:
    """Raises UserError for a loss that is no number, and for such a gradient unless the loss scale takes care
    of it."""
    names = ("loss",) if precision == "float16" else ("loss", "grad_norm")
    for name in names:
        if not math.isfinite(metrics[name]):
            raise UserError(
                f"the {name} of step {step} is {metrics[name]}, expected a number; nothing of this step is "
                "saved: start again with a smaller --optim.max-learning-rate in another --run-dir, from the "
                f"last checkpoint's parameters with --init.run-dir {config.run_dir} if there is one"
            )


def falls_on(interval: int | None, step: int) -> bool:
    """Whether something done every `interval` steps is done after `step`."""
    return interval is not None and step % interval == 0


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


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed for what is asked for next, where it can (glibc).

    Otherwise it hands every large tensor's pages back, and the kernel clears them anew for the next tensor:
    an eager step of a large model loses a third of its time to that.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or the GPU where there is one. Raises UserError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """Whether the compiler is there that torch.compile calls; says so where it is not."""
    if device.type == "cuda":  # Triton builds its launchers in C
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if any(map(shutil.which, names)):
        return True
    console.message(f"no compiler found ({' or '.join(names)}): running eagerly, as with --train.no-compile")
    return False


def batch_spec(config: RunConfig) -> BatchSpec:
    """How the steps of `config` are cut. Raises UserError where the total batch does not divide."""
    return BatchSpec(
        block_size=config.model.block_size,
        batch_size=config.data.batch_size,
        total_batch_size=config.data.total_batch_size,
        seed=config.train.seed,
    )


def fit(
    config: RunConfig, spec: BatchSpec, hardware: perf.Hardware, precision: Precision, console: Console
) -> BatchSpec:
    """`spec` with microsteps that the device's free memory holds, the same tokens a step; says so if it
    changed."""
    batch_size = perf.fit_batch_size(
        config.model,
        batch_size=spec.batch_size,
        block_size=spec.block_size,
        precision=precision,
        loss_chunk_tokens=DEFAULT_CHUNK_TOKENS,
        available_bytes=hardware.available_bytes,
    )
    if batch_size == spec.batch_size:
        return spec
    smaller = dataclasses.replace(spec, batch_size=batch_size)
    console.message(
        f"{spec.batch_size} sequences in a microstep do not fit {hardware.name}: "
        f"{batch_size} at a time and {smaller.accumulation} microsteps instead of {spec.accumulation}"
    )
    return smaller


def smaller_microsteps(spec: BatchSpec, *, steps_done: int, error: Exception) -> BatchSpec:
    """`spec` with half the sequences in a microstep (or the largest divisor below), the same tokens a step.

    Raises UserError from `error` where there is nothing to divide, and after the first step, which needs no
    less memory than the others: there something else takes it.
    """
    size = spec.batch_size
    if steps_done or size == 1:
        raise UserError(
            f"out of memory after {steps_done} steps with {size} sequences in a microstep; free memory or "
            f"set a smaller {'--data.batch-size' if size > 1 else '--model.*'}, and start the same command "
            "again"
        ) from error
    smaller = next(part for part in range(size // 2, 0, -1) if size % part == 0)
    return dataclasses.replace(spec, batch_size=smaller)


def starting_state(plan: Plan, optimizer: optim.Transform, checkpointer: Checkpointer) -> TrainState:
    """The state that the run starts with: from its checkpoint, from another run's parameters, or fresh."""
    config, device = plan.config, plan.hardware.device
    generator = torch.Generator(device).manual_seed(config.train.seed)
    state = init_state(config.model, optimizer, generator)
    if plan.start:
        return checkpointer.restore(plan.start, like=state)
    if config.init.run_dir is None:
        return state
    params, _ = load_params(config.init.run_dir / CHECKPOINTS)
    if differences := tree.diff(params, state.params):
        raise UserError(
            f"{config.init.run_dir} holds another model: {differences[0]}; set --model.* to its shape or "
            f"choose another --init.run-dir"
        )
    return state._replace(params={name: params[name].to(device) for name in state.params})


def make_trackers(plan: Plan, console: Console) -> Trackers:
    """Everything that hears of the run."""
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


def copy_to_host(metrics: Metrics) -> Callable[[], dict[str, float]]:
    """Starts to copy the metrics of a step and returns what waits for them: that step alone, not the ones
    after it."""
    host = {name: value.to("cpu", non_blocking=True) for name, value in metrics.items()}
    copied = torch.cuda.current_stream().record_event() if metrics["loss"].is_cuda else None

    def read() -> dict[str, float]:
        if copied is not None:
            copied.synchronize()
        return {name: float(value) for name, value in host.items()}

    return read


@contextlib.contextmanager
def full_disk_in_a_sentence(run_dir: Path) -> Iterator[None]:
    """Raises UserError where the disk has no more room for what a run writes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"no more room to write in {run_dir} ({error.strerror}); free some and start the same command "
            f"again, which goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that receives the number of a SIGINT or SIGTERM; a second one ends the program as it would
    have."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_main = threading.current_thread() is threading.main_thread()
    try:
        for number in before if is_main else ():
            signal.signal(number, handle)
        yield caught
    finally:
        for number, handler in before.items() if is_main else ():
            signal.signal(number, handler)
