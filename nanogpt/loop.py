"""The training loop: a run's steps, and what happens between them."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt import optim, perf, sharding
from nanogpt.checkpoint import Checkpointer
from nanogpt.config import RunConfig
from nanogpt.data import Batch, batch_at, batch_hash, prefetch, require_ids
from nanogpt.errors import UserError
from nanogpt.evals import validation_batches, validation_loss, validation_windows
from nanogpt.plan import Plan
from nanogpt.plot import draw_loss
from nanogpt.processes import Team
from nanogpt.run_dir import METRICS, PICTURE, describe
from nanogpt.sample import generate, text_of
from nanogpt.tracker import Console, Tracker
from nanogpt.train import Metrics, Precision, TrainState, make_eval_step, make_train_step

Moment = float | torch.cuda.Event
"""Seconds of the host's clock, or on a GPU an event in its stream, since Python runs a step ahead of it."""


class RunResult(NamedTuple):
    """How a run ended."""

    state: TrainState | None
    """The last state; None if the run had already finished."""
    step: int
    loss: float | None
    val_loss: float | None
    run_dir: Path


class Interrupted(Exception):
    """A signal asked the run to stop, and the state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@dataclasses.dataclass
class Loop:
    """A run's steps and what happens between them; all ranks of a mesh do the same, in the same order."""

    plan: Plan
    optimizer: optim.Transform
    schedule: optim.Schedule
    checkpointer: Checkpointer
    trackers: Tracker
    console: Console
    team: Team
    mesh: sharding.DeviceMesh | None = None
    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    evaluated_at: int | None = None
    hashes: dict[int, int] = dataclasses.field(default_factory=dict)
    """By step, of the batches that have been read but not logged yet."""

    def run(self, state: TrainState, caught: Sequence[int]) -> RunResult:
        """Runs the planned steps from `state` on. A signal's number in `caught` ends them after the current
        step, with a checkpoint."""
        plan, config = self.plan, self.plan.config
        choices: dict[str, Any] = dict(
            mesh=self.mesh,
            precision=plan.precision,
            attention=config.train.attention,
            loss_chunk_tokens=plan.loss_chunk_tokens,
            compile=plan.compile,
        )
        resharding = config.mesh.reshard_after_forward
        train_step = make_train_step(
            config.model,
            self.optimizer,
            seed=config.train.seed,
            reshard_after_forward=resharding,
            donate=True,
            **choices,
        )
        self.eval_step = make_eval_step(config.model, **choices)
        self.step, pending = plan.start, None
        runs_ahead = plan.hardware.device.type == "cuda"  # elsewhere a step is done when its call returns
        self.began = now(plan.hardware.device)
        with contextlib.closing(self.batches()) as batches:
            while self.step < plan.last:
                with self.saving(state, pending):
                    batch = next(batches)
                self.team.step(self.step + 1)
                state, metrics = train_step(state, batch)
                reading = copy_to_host(metrics)
                if pending is not None:  # the step before: its numbers arrive while this one still runs
                    self.report(self.step, *pending())
                self.step, pending = self.step + 1, reading
                stop, self.hashes[self.step] = self.agree(caught)  # once per step: a later signal waits
                is_last = bool(stop) or self.step == plan.last
                if not runs_ahead or is_last or self.is_due():
                    self.report(self.step, *pending())
                    pending = None
                if is_last or self.is_due():
                    self.between_steps(state, is_last=is_last)
                if is_last and self.step < plan.last:
                    self.stop(stop)
        return RunResult(state, self.step, self.loss, self.val_loss, config.run_dir)

    def batches(self) -> Generator[Batch, None, None]:
        """The batches of the planned steps, on the device."""
        plan = self.plan

        def read(step: int) -> Batch:
            batch = self.require_ids(batch_at(plan.dataset.train, step, plan.spec))
            self.hashes[step + 1] = batch_hash(batch, step, plan.spec)
            return batch

        return prefetch(read, range(plan.start, plan.last), plan.hardware.device)

    def require_ids(self, batch: Batch) -> Batch:
        """The batch. Raises UserError if it has an id that only a manifest has ruled out."""
        require_ids(batch, self.plan.config.model.vocab_size, self.plan.dataset.folder)
        return batch

    def agree(self, caught: Sequence[int]) -> tuple[int, int]:
        """(a signal that some rank has caught, or 0; hash of the step's whole batch), equal on all ranks."""
        own = (max(caught, default=0), self.hashes.pop(self.step))
        if self.mesh is None:
            return own
        stop, whole_hash = sharding.sums_over_ranks(*own)
        return (max(caught, default=0) or signal.SIGTERM if stop else 0), whole_hash

    def is_due(self) -> bool:
        """Whether evaluation, a checkpoint or a sample is due after this step."""
        groups = (self.plan.config.eval, self.plan.config.checkpoint, self.plan.config.sample)
        return any(falls_on(group.interval, self.step) for group in groups)

    def report(self, step: int, metrics: dict[str, float], ended: Moment) -> None:
        """Logs a step's numbers; raises UserError if they show that the parameters are lost."""
        seconds, self.began = seconds_between(self.began, ended), ended
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
                "mfu": flops / (self.plan.peak_flops * self.plan.spec.process_count),
                "seconds": seconds,
                "batch_hash": f"{self.hashes.pop(step):016x}",
            }
        )
        check_finite(self.plan.config, step, metrics, self.plan.precision)

    def between_steps(self, state: TrainState, *, is_last: bool) -> None:
        """Evaluation, checkpoint, picture and sample: whichever are due, and all of them at the run's end."""
        is_end = self.step == self.plan.config.train.max_steps
        if is_end or falls_on(self.plan.config.eval.interval, self.step):
            with self.saving(state):
                self.evaluate(state)
        if is_last or falls_on(self.plan.config.checkpoint.interval, self.step):
            self.save(state)
        if is_end or falls_on(self.plan.config.sample.interval, self.step):
            self.write_sample(state)
        self.began = now(self.plan.hardware.device)  # tokens per second count training alone

    @contextlib.contextmanager
    def saving(
        self, state: TrainState, pending: Callable[[], tuple[dict[str, float], Moment]] | None = None
    ) -> Iterator[None]:
        """Saves `state` if the tokens cannot be read meanwhile, for it is whole, unless `pending`, its step's
        numbers, shows otherwise. Not on several ranks, of which the others may be in the middle of a step."""
        try:
            yield
        except UserError:
            if self.mesh is None:
                if pending is not None:
                    self.report(self.step, *pending())
                if (self.checkpointer.latest() or 0) < self.step:
                    self.save(state)
                    self.checkpointer.wait()
                    self.console.message(
                        f"stopped at step {self.step}, saved, since the next tokens cannot be read"
                    )
            raise

    def save(self, state: TrainState) -> None:
        """Starts to write a checkpoint, and draws the picture."""
        about = describe(self.plan.config, self.plan.dataset, self.plan.precision)
        fresh = self.val_loss if self.evaluated_at == self.step else None
        self.checkpointer.save(self.step, state, metadata=about, val_loss=fresh)
        run_dir = self.plan.config.run_dir
        if self.team.world.rank == 0:
            draw_loss(run_dir / METRICS, run_dir / PICTURE, title=run_dir.name)

    def evaluate(self, state: TrainState) -> None:
        """Logs the loss on the validation text."""
        spec, tokens, count = self.plan.spec, self.plan.dataset.val, self.plan.config.eval.tokens
        batches = validation_batches(
            tokens,
            token_count=count,
            batch_size=spec.batch_size,
            block_size=spec.block_size,
            device=self.plan.hardware.device,
            process_index=spec.process_index,
            process_count=spec.process_count,
        )
        targets = spec.block_size * validation_windows(tokens, token_count=count, block_size=spec.block_size)
        checked = map(self.require_ids, batches)
        self.val_loss = validation_loss(self.eval_step, state.params, checked, count=targets)
        self.evaluated_at = self.step
        self.trackers.log({"step": self.step, "val_loss": self.val_loss})

    def write_sample(self, state: TrainState) -> None:
        """Logs a text that the model writes; the same (seed, step) draws the same text."""
        plan, settings, tokenizer = self.plan, self.plan.config.sample, self.plan.dataset.tokenizer
        if tokenizer is None:
            return
        params = state.params if self.mesh is None else sharding.whole_on_first_rank(state.params)
        if params is None:  # rank 0 writes
            return
        device = plan.hardware.device
        tokens = generate(
            params,
            plan.config.model,
            torch.tensor([tokenizer.encode(settings.prompt)], device=device),
            max_new_tokens=settings.tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            generator=torch.Generator(device).manual_seed(plan.config.train.seed + self.step),
        )
        self.trackers.log({"step": self.step, "sample": text_of(tokens[0], tokenizer)})

    def stop(self, number: int) -> None:
        """Ends a run that a signal interrupted, once its checkpoint is complete."""
        self.checkpointer.wait()
        self.console.message(f"stopped at step {self.step}, saved; the same command goes on from there")
        raise Interrupted(number)


def check_finite(config: RunConfig, step: int, metrics: dict[str, float], precision: Precision) -> None:
    """Raises UserError for a loss that is not finite, and for such a gradient norm unless precision is
    float16, whose loss scale handles it."""
    names = ("loss",) if precision == "float16" else ("loss", "grad_norm")
    for name in names:
        if not math.isfinite(metrics[name]):
            raise UserError(
                f"the {name} of step {step} is {metrics[name]}, expected a number; nothing of this step is "
                "saved: start again with a smaller --optim.max-learning-rate in another --run-dir, from the "
                f"last checkpoint's parameters with --init.run-dir {config.run_dir} if there is one"
            )


def falls_on(interval: int | None, step: int) -> bool:
    """Whether something that happens every `interval` steps happens after `step`."""
    return interval is not None and step % interval == 0


def copy_to_host(metrics: Metrics) -> Callable[[], tuple[dict[str, float], Moment]]:
    """Starts to copy a step's metrics to the host. Returns a function that waits for them, but for no later
    step, and returns them with the moment at which the step ended."""
    device = metrics["loss"].device
    waits_later = device.type == "cuda"  # for an event; on other devices nothing tells when a copy is done
    host = {name: value.to("cpu", non_blocking=waits_later) for name, value in metrics.items()}
    copied = now(device)

    def read() -> tuple[dict[str, float], Moment]:
        if isinstance(copied, torch.cuda.Event):
            copied.synchronize()
        numbers = {name: float(value) for name, value in host.items()}
        return numbers, copied if isinstance(copied, torch.cuda.Event) else time.perf_counter()

    return read


def now(device: torch.device) -> Moment:
    """This moment; on a GPU the moment at which it finishes what has been launched so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Moment, end: Moment) -> float:
    """Seconds from one moment to a later one of the same device; both have to have passed."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that receives the number of a SIGINT, SIGTERM or SIGHUP (a closed terminal); a second signal has
    its usual effect."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not print: the signal may have interrupted one.
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        before[int(signal.SIGHUP)] = signal.getsignal(signal.SIGHUP)
    is_main = threading.current_thread() is threading.main_thread()
    try:
        for number in before if is_main else ():
            signal.signal(number, handle)
        yield caught
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # not if meeting.ignore_torchrun has replaced it
                signal.signal(number, handler)
