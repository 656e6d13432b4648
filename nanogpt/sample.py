"""Text from a model: the prompt in one pass, then token by token with a cache of keys and values.

`python -m nanogpt.sample --run-dir runs/gpt2_124m --prompt "To be"` prints a continuation from a run's
checkpoint.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int
from torch import Tensor, nn

from nanogpt import command
from nanogpt.checkpoint import CHECKPOINTS, load_params
from nanogpt.config import LARGEST_SEED
from nanogpt.errors import UserError
from nanogpt.graph import as_one_graph
from nanogpt.model import GPT2Config, Params, call, require_leaves
from nanogpt.tokenizer import Tokenizer, tokenizer_from
from nanogpt.tracker import printable

Cache = list[tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]]
"""Each layer's keys and values for S = block_size positions; positions not reached yet hold zeros."""

LOWEST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken, since logits divided by less would leave the range of fp32."""


def generate(
    params: Params,
    config: GPT2Config,
    prompt: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    compile: bool = False,
) -> Int[Tensor, "B N"]:
    """The prompt followed by `max_new_tokens` drawn tokens.

    `temperature` 0 takes the likeliest token. `top_k` keeps the k likeliest tokens, `top_p` the smallest set
    whose probability reaches p (Holtzman et al. 2020). When `block_size` positions are full, the text goes on
    from its last half block. With `compile` the one-token step is compiled, once for all positions. Raises
    UserError for settings out of range and if a leaf is missing.
    """
    require_leaves(params, config)
    check_settings(config, prompt, max_new_tokens, temperature, top_k, top_p)
    step = compiled_decode(config, len(prompt)) if compile else decode
    tokens = prompt[:, -config.block_size :]
    cache = empty_cache(params, config, prompt.shape[0])
    with torch.no_grad():
        logits, position = decode(params, tokens, 0, cache, config), tokens.shape[1]
        for _ in range(max_new_tokens):
            drawn = draw(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            prompt = torch.cat([prompt, drawn], dim=1)
            if position < config.block_size:
                logits = step(params, drawn, torch.tensor(position, device=prompt.device), cache, config)
                position += 1
            else:
                position = max(config.block_size // 2, 1)
                logits = decode(params, prompt[:, -position:], 0, cache, config)
    return prompt


def decode(
    params: Params, tokens: Int[Tensor, "B T"], start: int | Int[Tensor, ""], cache: Cache, config: GPT2Config
) -> Float[Tensor, "B V"]:
    """Logits after the last of `tokens`, the first at position `start`; keys and values go to `cache`.

    Every call attends to all S positions of the cache through a mask, so shapes do not depend on `start`.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device) + start
    seen = torch.arange(config.block_size, device=tokens.device) <= positions[:, None]

    def through_block(layer: int, block: nn.Module, x: Tensor) -> Tensor:
        def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
            k_BHSD, v_BHSD = cache[layer]
            k_BHSD.index_copy_(2, positions, k_BHTD)
            v_BHSD.index_copy_(2, positions, v_BHTD)
            return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=seen)

        return block(x, attend)

    features = call(config.skeleton, params, (tokens, positions, through_block))
    # The padded head is no faster for one row, and padding would copy it.
    return F.linear(features[:, -1], params["wte.weight"])


@functools.cache
def compiled_decode(config: GPT2Config, batch_size: int) -> Callable[..., Float[Tensor, "B V"]]:
    """`decode` as one graph for this model and batch size, so each pair has its own count of graphs."""
    return as_one_graph(decode, dynamic=False)


def draw(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "B 1"]:
    """One token per row from the tempered and cut distribution; randomness comes from `generator` alone."""
    if temperature < LOWEST_TEMPERATURE:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]))  # no more than k, even if the last ones are equal
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:  # rounded sums reach 1 before the last tokens
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before this one already reach p
        beyond[:, 0] = False  # however small p is: in fp32 it may be 0
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def empty_cache(params: Params, config: GPT2Config, batch_size: int) -> Cache:
    """Room for block_size positions in every layer, in the dtype and on the device of the blocks."""
    like = params["ln_f.weight"]
    shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.n_layer)]


def check_settings(
    config: GPT2Config,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Raises UserError for a prompt without tokens or a setting out of range."""
    if prompt.ndim != 2 or prompt.numel() == 0:
        raise UserError(f"the prompt has shape {list(prompt.shape)}, expected [B, T] with at least one token")
    for token in (int(prompt.min()), int(prompt.max())):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"the prompt has token id {token}, expected ids from 0 to {config.vocab_size - 1}"
            )
    if max_new_tokens < 0 or not 0 <= temperature < math.inf:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}, expected numbers of at least "
            "0"
        )
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, expected at least 1; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected above 0 and at most 1; leave it out to keep every token")


def text_of(tokens: Int[Tensor, "N"], tokenizer: Tokenizer) -> str:
    """The text of drawn tokens, without ids beyond the tokenizer's: the model's vocabulary may be larger."""
    return tokenizer.decode([token for token in tokens.tolist() if token < tokenizer.vocab_size])


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Print text that a trained model writes."""

    run_dir: Path = Path("runs/gpt2_124m")
    """Run directory with a checkpoint."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a new line)")] = "\n"
    """Text to go on from."""
    max_new_tokens: int = 200
    """Tokens to write, at least 1."""
    count: int = 1
    """Number of texts, at least 1."""
    temperature: float = 0.8
    """0 takes the likeliest token, 1 draws from the model as it is."""
    top_k: int | None = 200
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability, above 0 and at most 1."""
    seed: int = 1337
    """Same seed, same text."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "count"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1; set --{flag}")
        if not self.prompt:
            raise UserError("the prompt is empty, expected at least one character; set --prompt")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"the temperature is {self.temperature}, expected a number of at least 0; set --temperature"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"the seed is {self.seed}, expected from 0 to {LARGEST_SEED}; set --seed")


def main(wanted: SampleCommand) -> None:
    """Prints `count` texts, a line of dashes between them."""
    params, metadata = load_params(wanted.run_dir / CHECKPOINTS)
    config = GPT2Config(**metadata["config"]["model"])
    tokenizer = tokenizer_from(metadata["tokenizer"])
    prompt = torch.tensor([tokenizer.encode(wanted.prompt)] * wanted.count)
    texts = generate(
        params,
        config,
        prompt,
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        generator=torch.Generator().manual_seed(wanted.seed),
    )
    print(printable(f"\n{'-' * 80}\n".join(text_of(row, tokenizer) for row in texts), sys.stdout))


if __name__ == "__main__":
    with command.mistakes_in_a_sentence():
        main(command.parse(SampleCommand, default=SampleCommand()))
