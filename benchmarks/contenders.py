"""The same training step, four times: ours, a plain `nn.Module`, Hugging Face's GPT-2 and litgpt's GPT.

Each contender is `(Work) -> Step`. All start from the same parameters (litgpt: its own, of the same shapes),
see the same batches and end a step in the same way: clip to norm 1, AdamW with decay on matrices, the same
learning rates.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.plain import plain_gpt2
from nanogpt import optim
from nanogpt.attention import Attention
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.loss import chunk_tokens_of
from nanogpt.model import GPT2Config, init
from nanogpt.run import keep_freed_memory
from nanogpt.train import DTYPES, Precision, TrainState, init_state, make_train_step

Step = Callable[[Batch], Tensor]
"""Trains on a batch and returns its loss, still on the device. It owns the parameters that it trains."""

SEED = 1337
BATCHES = 4  # different ones, so that no step sees what it just learned
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 0.1, 1.0
SCHEDULE = optim.warmup_cosine(6e-4, final=6e-5, warmup_steps=715, total_steps=17234)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step has to do."""

    model: GPT2Config = field(default_factory=GPT2Config)
    batch_size: int = 4
    accumulation: int = 1
    precision: Precision = "bfloat16"
    attention: Attention = "auto"
    compile: bool = True
    device: str = "cpu"
    all_keep_memory: bool = False
    """Whether every contender keeps freed memory on a CPU, as ours does."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.accumulation * self.batch_size * self.model.block_size


def batches_of(work: Work, rank: int = 0, size: int = 1) -> list[Batch]:
    """The batches of every contender: random tokens, the same on every device.

    Each of `size` ranks has rows of its own; together these are the batch of one process with all sequences.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (work.accumulation, size * work.batch_size, work.model.block_size + 1)
    rows = [torch.randint(work.model.vocab_size, shape, generator=generator) for _ in range(BATCHES)]
    rows = [row[:, rank * work.batch_size : (rank + 1) * work.batch_size] for row in rows]
    return [
        Batch(row[..., :-1].contiguous().to(work.device), row[..., 1:].contiguous().to(work.device))
        for row in rows
    ]


def make_optimizer(work: Work) -> optim.Transform:
    """Clipping and AdamW, as `run` makes them."""
    b1, b2 = BETAS
    optimizer = optim.chain(
        optim.clip_by_global_norm(CLIP_NORM), optim.adamw(SCHEDULE, b1=b1, b2=b2, weight_decay=WEIGHT_DECAY)
    )
    return optim.dynamic_loss_scale(optimizer) if work.precision == "float16" else optimizer


def ours(work: Work) -> Step:
    """This project's step, as `run` makes it: on a CPU it too keeps freed memory for the next step."""
    if work.device == "cpu":
        keep_freed_memory()
    optimizer = make_optimizer(work)
    state = init_state(work.model, optimizer, torch.Generator(work.device).manual_seed(SEED))
    return step_of(state, optimizer, work)


def step_of(
    state: TrainState,
    optimizer: optim.Transform,
    work: Work,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool = False,
) -> Step:
    """This project's step, starting from `state`, which it takes over; on a `mesh`, one rank's side of it."""
    train_step = make_train_step(
        work.model,
        optimizer,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        precision=work.precision,
        attention=work.attention,
        loss_chunk_tokens=chunk_tokens_of(work.device, work.precision),
        donate=True,
        compile=work.compile,
    )

    def step(batch: Batch) -> Tensor:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics["loss"]

    return step


def plain(work: Work) -> Step:
    """`nn.Module`, autocast, torch.compile, fused AdamW."""
    model = plain_gpt2(work.model, init(work.model, torch.Generator(work.device).manual_seed(SEED)))
    return module_step(model, model, work)


def hugging_face(work: Work) -> Step:
    """transformers' GPT2LMHeadModel from its config (nothing is downloaded), in the plain module's loop."""
    transformers = importlib.import_module("transformers")

    config = transformers.GPT2Config(
        vocab_size=work.model.vocab_size,
        n_positions=work.model.block_size,
        n_embd=work.model.n_embd,
        n_layer=work.model.n_layer,
        n_head=work.model.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    with torch.device(work.device):
        model = transformers.GPT2LMHeadModel(config).train()
    params = init(work.model, torch.Generator(work.device).manual_seed(SEED))
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(params[name.removeprefix("transformer.")])

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return module_step(model, loss, work)


def litgpt(work: Work) -> Step:
    """litgpt's GPT of GPT-2's shape, in the plain module's loop.

    It has rotary positions instead of learned ones, and random parameters of its own, so its loss is near the
    others' but not equal.
    """
    package = importlib.import_module("litgpt")

    config = package.Config(
        block_size=work.model.block_size,
        vocab_size=work.model.vocab_size,
        padded_vocab_size=work.model.padded_vocab_size,
        n_layer=work.model.n_layer,
        n_head=work.model.n_head,
        n_embd=work.model.n_embd,
        rotary_percentage=0.25,
        parallel_residual=False,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )
    with torch.device(work.device):
        torch.manual_seed(SEED)
        model = package.GPT(config)
        model.lm_head.weight = model.transformer.wte.weight
        model.apply(_initialise)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return module_step(model, loss, work)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


CONTENDERS: dict[str, Callable[[Work], Step]] = {
    "ours": ours,
    "plain": plain,
    "hugging_face": hugging_face,
    "litgpt": litgpt,
}
PACKAGES = {"hugging_face": "transformers", "litgpt": "litgpt"}
MODELS = {"hugging_face": "GPT2LMHeadModel", "litgpt": "GPT"}
"""What a contender uses of its package, which may import it only when it is asked for."""


def installed_contenders() -> list[str]:
    """The contenders whose package is installed, ours first."""
    return [name for name in CONTENDERS if importlib.util.find_spec(PACKAGES.get(name, "torch"))]


def check_installed(*names: str) -> None:
    """Raises UserError for a contender whose package is not installed."""
    here = installed_contenders()
    for name in names:
        if name not in here:
            raise UserError(
                f"no package {PACKAGES[name]} on this machine, expected it for the contender {name}; install "
                f"it (nanogpt[peers] has it), or leave {name} out"
            )


def check_imports(name: str) -> None:
    """Raises UserError for a contender whose package is not installed, or cannot be imported."""
    check_installed(name)
    if name not in PACKAGES:
        return
    try:
        getattr(importlib.import_module(PACKAGES[name]), MODELS[name])
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"package {PACKAGES[name]} cannot be imported ({why}), expected it for the contender {name}; "
            f"install one that fits the packages beside it (nanogpt[peers] has it), or leave {name} out"
        ) from error


def module_step(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], work: Work) -> Step:
    """The usual loop around a module: autocast, backward, clip, fused AdamW."""
    matrices = [leaf for leaf in model.parameters() if leaf.ndim >= 2]
    vectors = [leaf for leaf in model.parameters() if leaf.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(work.device, enabled=work.precision == "float16")
    autocast = torch.autocast(
        torch.device(work.device).type, DTYPES[work.precision], enabled=work.precision != "float32"
    )
    compiled = torch.compile(loss_of, dynamic=False) if work.compile else loss_of
    count = 0

    def step(batch: Batch) -> Tensor:
        nonlocal count
        for group in optimizer.param_groups:
            group["lr"] = float(SCHEDULE(torch.tensor(count)))
        count += 1
        losses = []
        for inputs, targets in zip(*batch, strict=True):
            with autocast:
                loss = compiled(inputs, targets) / work.accumulation
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    return step
