"""What a run is made of: frozen dataclasses whose docstrings are the command line's help."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanogpt.attention import Attention
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config

MOST_STEPS = 2**31 - 1
LARGEST_SEED = 2**62  # steps are added to it, in 64 bits


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule and the clip."""

    max_learning_rate: float = 6e-4
    """Learning rate at the end of the warmup, above 0."""
    min_learning_rate: float = 6e-5
    """Learning rate that the cosine ends at after the last step, from 0 to max-learning-rate."""
    warmup_steps: int = 715
    """Steps of linear warmup, from 1 to below max-steps."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings, at least 0; biases and norms are not decayed."""
    gradient_clip_norm: float = 1.0
    """Largest global norm of the gradient, above 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments, each at least 0 and below 1."""

    def __post_init__(self) -> None:
        lowest, highest = self.min_learning_rate, self.max_learning_rate
        if not 0 <= lowest <= highest < math.inf or highest == 0:
            raise UserError(
                f"learning rates from {highest} down to {lowest}, expected 0 <= min <= max, max above 0 and "
                f"finite; set --optim.max-learning-rate or --optim.min-learning-rate"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"weight decay is {self.weight_decay}, expected a number of at least 0; set "
                f"--optim.weight-decay"
            )
        for name in ("gradient_clip_norm", "warmup_steps"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected above 0; set --optim.{name.replace('_', '-')}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"betas are {self.betas}, expected each at least 0 and below 1; set --optim.betas"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are and how many a step takes."""

    path: str | None = None
    """Folder with train.bin and val.bin (raw uint16), or "shakespeare" or "shakespeare-char" for the bundled
    text. None takes data/openwebtext where it has been prepared, else the bundled text."""
    batch_size: int = 64
    """Sequences of one device in one microstep, at least 1; halved until it fits the device's memory."""
    total_batch_size: int = 524288
    """Tokens in a step over all devices; a multiple of batch-size x block-size x devices. Accumulation
    follows."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "total_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}, expected at least 1; set "
                    f"--data.{name.replace('_', '-')}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, where and in which arithmetic."""

    max_steps: int = 17234
    """Optimizer steps of the whole run, at least 2; the schedule ends there. 17,234 is one epoch of
    OpenWebText."""
    stop_after: int | None = None
    """Stop at this step with a checkpoint, schedule unchanged; the same command without it goes on. At least
    1."""
    seed: int = 1337
    """Decides the initial parameters, the order of the data and dropout masks; from 0 to 2^62. A CPU draws
    parameters and samples by its last 32 bits alone."""
    device: str | None = None
    """"cuda", "cpu" or "mps"; None takes the GPU where there is one."""
    precision: Literal["bfloat16", "float16", "float32"] | None = None
    """What is multiplied in (master weights stay float32); None takes bfloat16 where the device is fast at
    it, else float16 on a GPU, else float32, and a run that goes on keeps what it began with."""
    compile: bool = True
    """Compile the step: one block's graph serves all layers. Without, the same code runs eagerly, at once."""
    attention: Attention = "auto"
    """Which attention kernel to use: one of PyTorch's, or batched products; auto is PyTorch's choice, but
    products where they are faster: compiled, in bfloat16, on a CPU with AVX-512's bfloat16 and no AMX. With
    dropout there is no choice: auto or math."""

    def __post_init__(self) -> None:
        if not 2 <= self.max_steps <= MOST_STEPS:
            raise UserError(
                f"max steps is {self.max_steps}, expected from 2 to {MOST_STEPS}; set --train.max-steps"
            )
        if self.stop_after is not None and self.stop_after < 1:
            raise UserError(f"stop after is {self.stop_after}, expected at least 1; set --train.stop-after")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"the seed is {self.seed}, expected from 0 to {LARGEST_SEED}; set --train.seed")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How a run that torchrun starts is laid out over its processes, one for each device."""

    shard: int | None = None
    """Processes among which parameters and optimizer state are divided, at least 1; 1 is plain data parallel.
    None takes the processes of a machine."""
    replicate: int | None = None
    """Groups of that size, each with the whole state, at least 1; shard x replicate = processes. None
    follows."""
    reshard_after_forward: bool = False
    """Free a block's gathered parameters between its forward and backward pass: less memory, more traffic."""
    timeout_s: float = 600.0
    """Seconds that a collective waits for a rank: above the longest compilation, at most 1,000,000."""

    def __post_init__(self) -> None:
        for name in ("shard", "replicate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"mesh.{name} is {value}, expected at least 1; set --mesh.{name}")
        if not 0 < self.timeout_s <= 1e6:
            raise UserError(
                f"the timeout is {self.timeout_s} s, expected above 0 and at most 1,000,000; "
                "set --mesh.timeout-s"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation loss while training."""

    interval: int | None = 250
    """Steps between evaluations, at least 1; None evaluates at the end only."""
    tokens: int = 1_048_576
    """Validation tokens in an evaluation, at least one window; the same ones each time."""

    def __post_init__(self) -> None:
        check_interval("eval", self.interval)
        if self.tokens < 1:
            raise UserError(f"an evaluation of {self.tokens} tokens, expected at least 1; set --eval.tokens")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved."""

    interval: int | None = 1000
    """Steps between checkpoints, at least 1; None saves at the end only."""
    keep: int = 2
    """Newest checkpoints to keep, at least 1; the one with the best validation loss stays as well."""

    def __post_init__(self) -> None:
        check_interval("checkpoint", self.interval)
        if self.keep < 1:
            raise UserError(f"keeping {self.keep} checkpoints, expected at least 1; set --checkpoint.keep")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where progress goes besides the terminal and metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] | None = None
    """Weights & Biases; None is online when logged in and offline otherwise."""
    project: str = "nanogpt"
    """Name of the Weights & Biases project."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text that the model writes while training."""

    interval: int | None = 1000
    """Steps between samples, at least 1; None samples at the end only."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a new line)")] = "\n"
    """What it goes on from, at least one character."""
    tokens: int = 100
    """Tokens to write, at least 1."""
    temperature: float = 0.8
    """At least 0: 0 takes the likeliest token, 1 draws from the model as it is."""
    top_k: int | None = 200
    """Draw among the k likeliest tokens only, k at least 1; None draws among all."""

    def __post_init__(self) -> None:
        check_interval("sample", self.interval)
        if (
            self.tokens < 1
            or not 0 <= self.temperature < math.inf
            or (self.top_k is not None and self.top_k < 1)
            or not self.prompt
        ):
            raise UserError(
                f"a sample of {self.tokens} tokens at temperature {self.temperature} with top-k {self.top_k} "
                f"from {self.prompt!r}, expected at least 1, 0, 1 and a character; set --sample.*"
            )


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Parameters to start from instead of random ones."""

    run_dir: Path | None = None
    """Run directory whose newest checkpoint gives the parameters (not the optimizer's state); None starts
    afresh."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Train a GPT-2. The plan comes first; everything is written to the run directory."""

    model: GPT2Config = field(default_factory=GPT2Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    init: InitConfig = field(default_factory=InitConfig)
    resume: Literal["auto", "must", "never"] = "auto"
    """auto goes on from the run directory's newest checkpoint if there is one; must fails without one; never
    needs a directory that holds no run."""
    run_dir: Path = Path("runs/gpt2_124m")
    """Where checkpoints, metrics.jsonl, loss.png and the resolved config go."""
    plan: bool = False
    """Print the plan and stop: no run directory is made and nothing is compiled."""

    def __post_init__(self) -> None:
        if self.optim.warmup_steps >= self.train.max_steps:
            raise UserError(
                f"warmup takes {self.optim.warmup_steps} of {self.train.max_steps} steps, expected fewer; "
                f"set --optim.warmup-steps below --train.max-steps"
            )

    @property
    def last_step(self) -> int:
        """The step at which this start of the run ends: the schedule's end, or before it with stop_after."""
        return min(self.train.max_steps, self.train.stop_after or self.train.max_steps)


def check_interval(group: str, interval: int | None) -> None:
    """Raises UserError unless the interval is absent or at least one step."""
    if interval is not None and interval < 1:
        raise UserError(
            f"the {group} interval is {interval} steps, expected at least 1; set --{group}.interval (None "
            "for never)"
        )
