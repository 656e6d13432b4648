"""`python -m benchmarks.parts`: what the pieces around the step cost.

It times the optimizer next to `torch.optim.AdamW(fused=True)`, the loss next to the usual one over all
logits, saving and restoring a checkpoint, and sampling with and without the cache. The loader and prepare
have commands of their own.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import BETAS, SCHEDULE, SEED, WEIGHT_DECAY
from benchmarks.measure import (
    choose_device,
    facts,
    finish,
    one_line_errors,
    require_at_least,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
)
from nanogpt import optim, perf, tree
from nanogpt.checkpoint import Checkpointer
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.graph import as_one_graph
from nanogpt.loss import chunk_loss_and_grads, chunk_tokens_of, head_loss_and_grads
from nanogpt.model import GPT2Config, Params, apply, init
from nanogpt.sample import generate
from nanogpt.train import DTYPES, head_in, init_state
from nanogpt.update import make_update

TINY = GPT2Config(vocab_size=2048, block_size=128, n_layer=1, n_head=4, n_embd=128)
PROMPT_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """Time the optimizer, the loss, checkpoints and sampling."""

    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """A published size."""
    tokens: int = 1024
    """Tokens of the loss, at least 1."""
    new_tokens: int = 32
    """Tokens to sample, with the cache and again without: from 1 to what fits after a prompt of 8."""
    repeats: int = 5
    """Timings of each part, at least 2, in turns."""
    compile: bool = True
    """Compile our optimizer and both losses; the fused optimizer of torch needs no compiling."""
    device: str | None = None
    """cpu or cuda; None takes the GPU if there is one."""
    quick: bool = False
    """A model of one small layer, run eagerly, to see that everything works."""

    def __post_init__(self) -> None:
        require_at_least(1, tokens=self.tokens, new_tokens=self.new_tokens)
        require_at_least(2, repeats=self.repeats)
        most = self.shape.block_size - PROMPT_TOKENS + 1  # nothing follows the last one
        if self.new_tokens > most:
            raise UserError(
                f"new tokens is {self.new_tokens}, expected at most {most}, which fit this model's positions "
                f"after a prompt of {PROMPT_TOKENS}; set --new-tokens"
            )

    @property
    def shape(self) -> GPT2Config:
        """The model whose parts are timed."""
        return TINY if self.quick else GPT2Config.named(self.model)


def timed_in_turns(parts: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each part, timed in rounds of all parts; the first round is a warm-up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(repeats + 1):
        for name, part in parts.items():
            begin = time.perf_counter()
            part()
            if device != "cpu":
                torch.accelerator.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def optimizer_parts(params: Params, compile: bool) -> dict[str, Callable[[], Any]]:
    """One update of all parameters: ours (as in the step, leaf by leaf in the state's memory) and torch's.

    Gradients are constant.
    """
    b1, b2 = BETAS
    grads = tree.map(lambda leaf: torch.full_like(leaf, 1e-3), params)
    ours = optim.adamw(SCHEDULE, b1=b1, b2=b2, weight_decay=WEIGHT_DECAY)
    own = tree.map(torch.clone, params)
    state, norm = ours.init(own), tree.global_norm(grads)

    update = make_update(ours, donate=True, compile=compile)
    leaves = [leaf.clone().requires_grad_() for leaf in params.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad
    fused = torch.optim.AdamW(leaves, lr=6e-4, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    return {"optimizer, ours": lambda: update(grads, norm, state, own), "optimizer, torch fused": fused.step}


def loss_parts(
    config: GPT2Config, params: Params, tokens: int, compile: bool
) -> dict[str, Callable[[], Any]]:
    """The loss and its gradients: ours in chunks, and autograd's over all logits at once.

    The gradients are those of features and head, in the dtype that trains.
    """
    device = params["wte.weight"].device
    precision = perf.default_precision(perf.detect(device))
    dtype = DTYPES[precision]
    generator = torch.Generator(device).manual_seed(SEED)
    features = torch.randn(1, tokens, config.n_embd, device=device, generator=generator).to(dtype)
    targets = torch.randint(config.vocab_size, (1, tokens), device=device, generator=generator)
    head, chunk_tokens = head_in(dtype, params, config), chunk_tokens_of(device.type, precision)
    chunk = as_one_graph(chunk_loss_and_grads) if compile else chunk_loss_and_grads

    def ours(features: Tensor, head: Tensor, targets: Tensor) -> Any:
        return head_loss_and_grads(
            features, head, targets, vocab_size=config.vocab_size, chunk_tokens=chunk_tokens, chunk=chunk
        )

    def usual(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, head).flatten(0, 1), targets.flatten())

    usual = torch.compile(usual, dynamic=False) if compile else usual
    leaves = [features.clone().requires_grad_(), head.clone().requires_grad_()]

    def all_at_once() -> None:
        usual(*leaves, targets).backward()
        for leaf in leaves:
            leaf.grad = None

    return {"loss, ours": lambda: ours(features, head, targets), "loss, all logits": all_at_once}


def checkpoint_seconds(config: GPT2Config, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds until a save lets the run go on, until it is on disk, and for a restore."""
    state = init_state(config, optim.adamw(1e-3), torch.Generator(device).manual_seed(SEED))
    seconds: dict[str, list[float]] = {"save, run waits": [], "save, on disk": [], "restore": []}
    with tempfile.TemporaryDirectory(prefix="nanogpt-checkpoint-") as folder:
        checkpointer = Checkpointer(Path(folder), keep=1)
        for step in range(1, repeats + 1):
            begin = time.perf_counter()
            checkpointer.save(step, state, metadata={})
            seconds["save, run waits"].append(time.perf_counter() - begin)
            checkpointer.wait()
            seconds["save, on disk"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            checkpointer.restore(step, like=state)
            seconds["restore"].append(time.perf_counter() - begin)
        checkpointer.close()
    return seconds


def sampling_parts(config: GPT2Config, params: Params, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """Greedy tokens after a short prompt: with the cache, and with a full forward pass for each token."""
    prompt = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=params["wte.weight"].device)

    def without_cache() -> Tensor:
        tokens = prompt
        with torch.no_grad():
            for _ in range(new_tokens):
                drawn = apply(params, tokens, config)[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, drawn], dim=1)
        return tokens

    def with_cache() -> Tensor:
        return generate(params, config, prompt, max_new_tokens=new_tokens, temperature=0.0)

    return {"sample, cache": with_cache, "sample, no cache": without_cache}


def benchmark(config: PartsConfig) -> dict[str, Any]:
    """Every part's times."""
    device = choose_device(config.device)
    model, compile = config.shape, config.compile and not config.quick
    params = init(model, torch.Generator(device).manual_seed(SEED))
    seconds = {}
    for parts in (
        optimizer_parts(params, compile),
        loss_parts(model, params, config.tokens, compile),
        sampling_parts(model, params, config.new_tokens),
    ):
        seconds |= timed_in_turns(parts, config.repeats, device)
        say(f"{', '.join(parts)}: done")
    seconds |= checkpoint_seconds(model, device, config.repeats)
    work = {
        "model": asdict(model),
        "tokens": config.tokens,
        "new_tokens": config.new_tokens,
        "compile": compile,
    }
    summed = {name: spread(values)._asdict() for name, values in seconds.items()}
    return {
        "benchmark": "parts",
        "facts": facts(device),
        "work": work,
        "seconds": summed,
        "timings_s": seconds,
    }


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    amounts = {"loss": result["work"]["tokens"], "sample": result["work"]["new_tokens"]}
    rows = []
    for name, step in result["seconds"].items():
        amount = amounts.get(name.partition(",")[0])
        rate = f"{amount / step['median']:,.0f}" if amount else ""
        rows.append([name, f"{step['median']:.4f}", f"{step['min']:.4f}", f"{step['max']:.4f}", rate])
    return table(["part", "median s", "min s", "max s", "tokens/s"], rows)


def main() -> None:
    with one_line_errors():
        config = parse(PartsConfig, default=PartsConfig())
        say_what_quick_leaves_out(config, "model")
        result = benchmark(config)
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
