"""GPT-2 as a pure function of its parameters: `apply(params, tokens, config) -> logits`.

The network of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", exactly: learned
positions, LayerNorm before each sublayer, biases everywhere, tanh GELU, and a head tied to the token
embedding. Parameters keep the names and layouts of OpenAI's release (weights are [in, out]), so its files,
and Hugging Face's, load unchanged.
"""

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nanogpt.attention import Attention, causal_attention
from nanogpt.errors import UserError

Params = dict[str, Tensor]
"""Parameters under OpenAI's names: "wte.weight", "h.0.attn.c_attn.weight", ..., "ln_f.bias"."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values), each [B, H, T, D], to values; training and sampling each supply their own."""

ThroughBlock = Callable[[int, nn.Module, Tensor], Tensor]
"""(layer, block, x [B T C]) to the block's output: the caller decides how each block is run."""

SKELETONS = threading.RLock()
INIT_STD = 0.02
# A head of 50,304 columns multiplies faster than one of 50,257: its rows start at aligned addresses.
VOCAB_MULTIPLE = 128
PUBLISHED_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the default is the 124M one."""

    vocab_size: int = 50257
    """Number of token ids, at least 1. GPT-2's byte-pair encoding has 50,257; padding inside never shows."""
    block_size: int = 1024
    """Number of learned positions = length of a training sequence in tokens, at least 1."""
    n_layer: int = 12
    """Number of transformer blocks, at least 1."""
    n_head: int = 12
    """Number of attention heads in a block; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream, in features; a multiple of n_head."""
    dropout: float = 0.0
    """Probability of dropping a feature while training, in [0, 1). 0 is best where no text is seen twice."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(
                    f"model.{name} is {getattr(self, name)}, expected at least 1; set --model.{flag}"
                )
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd {self.n_embd} does not divide into {self.n_head} heads; "
                f"set --model.n-embd to a multiple of --model.n-head"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(
                f"dropout is {self.dropout}, expected at least 0 and below 1; set --model.dropout"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Columns of the head as it is multiplied: `vocab_size` rounded up to a multiple of 128."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @functools.cached_property
    def skeleton(self) -> "GPT2":
        """The module that names the parameters but holds none: it lives on the meta device.

        Cached on the config because a compiled function can read an attribute but cannot build a module. Read
        it once before compiling `apply`, as `init` and every `make_*` do.
        """
        with torch.device("meta"):
            return GPT2(self)

    @classmethod
    def named(cls, name: str) -> "GPT2Config":
        """One of the published sizes: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"."""
        if name not in PUBLISHED_SIZES:
            raise UserError(f"no GPT-2 is called {name!r}; expected one of {', '.join(PUBLISHED_SIZES)}")
        return cls(**PUBLISHED_SIZES[name])


def init(
    config: GPT2Config, generator: torch.Generator, *, place: Callable[[Tensor], Tensor] = lambda leaf: leaf
) -> Params:
    """Fresh fp32 parameters on the generator's device, a pure function of the generator's state.

    Weights are normal with deviation 0.02, those that write to the residual stream 0.02 / sqrt(2 n_layer);
    biases are 0 and LayerNorm gains 1. Source: Radford et al. 2019, section 2.3, and OpenAI's code. Each leaf
    goes through `place` before the next is drawn, so a rank that keeps only a shard never holds two whole
    leaves.
    """

    def init_leaf(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, device=generator.device)
        if ".ln_" in f".{name}":
            return torch.ones(shape, device=generator.device)
        std = INIT_STD / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else INIT_STD
        return torch.randn(shape, generator=generator, device=generator.device).mul_(std)

    return {name: place(init_leaf(name, leaf.shape)) for name, leaf in config.skeleton.named_parameters()}


def apply(
    params: Params,
    tokens: Int[Tensor, "B T"],
    config: GPT2Config,
    *,
    dropout_key: Int[Tensor, ""] | None = None,
    attention: Attention = "auto",
) -> Float[Tensor, "B T V"]:
    """Logits for the token after each position, in the dtype of `params`.

    Nothing is dropped without a `dropout_key`. Second derivatives need attention="math", and reverse mode on
    the inside, as in `jvp` of `grad` or `grad` of `grad`: those of a layer norm's `jvp` are wrong in PyTorch,
    without an error (its issue 196700). Raises UserError if T exceeds `block_size` or a leaf is missing.
    """
    features = apply_trunk(params, tokens, config, dropout_key=dropout_key, attention=attention)
    return F.linear(features, padded_head(params, config))[..., : config.vocab_size]


def apply_trunk(
    params: Params,
    tokens: Int[Tensor, "B T"],
    config: GPT2Config,
    *,
    dropout_key: Int[Tensor, ""] | None = None,
    attention: Attention = "auto",
    through_block: ThroughBlock | None = None,
) -> Float[Tensor, "B T C"]:
    """The features that the head turns into logits: the whole network except its last matrix product.

    `through_block` decides how a block is run (compiled, sharded), and where its parameters come from: then
    `params` need not hold them. By default each block runs eagerly on its part of `params`.
    """
    if tokens.ndim != 2:
        raise UserError(
            f"the tokens of a pass have shape {list(tokens.shape)}, expected [B, T] (a Batch has [A, B, T], "
            f"A passes); add or index the dimension that differs, as in tokens[None]"
        )
    if tokens.shape[1] > config.block_size:
        raise UserError(
            f"a sequence has {tokens.shape[1]} tokens, the model {config.block_size} positions; "
            f"cut the sequence or set --model.block-size"
        )
    if through_block is None:
        require_leaves(params, config)
    key = dropout_key if config.dropout else None

    def as_it_stands(layer: int, block: nn.Module, x: Tensor) -> Tensor:
        return block(x, make_attend(config, attention, block_key(key, layer)), block_key(key, layer))

    positions = torch.arange(tokens.shape[1], device=tokens.device)
    through = as_it_stands if through_block is None else through_block
    arguments = (tokens, positions, through, key)
    return call(config.skeleton, params, arguments)


def apply_block(
    params: Params,
    x: Float[Tensor, "B T C"],
    config: GPT2Config,
    *,
    dropout_key: Int[Tensor, ""] | None = None,
    attention: Attention = "auto",
) -> Float[Tensor, "B T C"]:
    """One block as a pure function of its own parameters ("ln_1.weight", ...), the same for every layer.

    `dropout_key` is the layer's own, from `block_key`.
    """
    key = dropout_key if config.dropout else None
    arguments = (x, make_attend(config, attention, key), key)
    return call(config.skeleton.get_submodule("h.0"), params, arguments)


def call(module: nn.Module, params: Params, arguments: tuple) -> Tensor:
    """`torch.func.functional_call`, one thread at a time: for its length the shared module holds `params`."""
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, params, arguments)
    with SKELETONS:
        return torch.func.functional_call(module, params, arguments)


def require_leaves(params: Params, config: GPT2Config) -> None:
    """Raises UserError if `params` lack a leaf: the skeleton's own has no values, yet can be multiplied."""
    names = [name for name, _ in config.skeleton.named_parameters()]
    if missing := [name for name in names if name not in params]:
        raise UserError(
            f"{missing[0]} is not among the parameters ({len(missing)} of {len(names)} leaves are missing); "
            f"expected the names that init(config, generator) gives them"
        )


def block_names(params: Params) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(one dict per block, one dict for the rest), each from the name inside to the full name in `params`.

    All blocks share their inner names: {"ln_1.weight": "h.0.ln_1.weight", ...}.
    """
    blocks: dict[str, dict[str, str]] = {}
    for name in params:
        if name.startswith("h."):
            _, layer, inner = name.split(".", 2)
            blocks.setdefault(layer, {})[inner] = name
    return list(blocks.values()), {name: name for name in params if not name.startswith("h.")}


def block_params(params: Params, layer: int) -> Params:
    """The parameters of one block, under their names inside the block."""
    prefix = f"h.{layer}."
    return {name.removeprefix(prefix): leaf for name, leaf in params.items() if name.startswith(prefix)}


def block_key(key: Int[Tensor, ""] | None, layer: int) -> Int[Tensor, ""] | None:
    """The dropout key of a layer; None where nothing is dropped."""
    return None if key is None else fold_in(key, layer + 1)


def make_attend(config: GPT2Config, attention: Attention, key: Int[Tensor, ""] | None) -> Attend:
    """Causal attention for training: a fused kernel, or, with dropout, explicit probabilities."""

    def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        if key is None:
            return causal_attention(q_BHTD, k_BHTD, v_BHTD, attention)
        return causal_attention_with_dropout(q_BHTD, k_BHTD, v_BHTD, config.dropout, key, 0)

    return attend


def padded_head(params: Params, config: GPT2Config) -> Float[Tensor, "P C"]:
    """The tied head with zero rows up to `padded_vocab_size`; the caller cuts the logits back to V."""
    embedding = params["wte.weight"]
    padding = embedding.new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    return torch.cat([embedding, padding])  # F.pad would write all of it twice


class GPT2(nn.Module):
    """Embeddings, blocks, final LayerNorm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "T"],
        through_block: ThroughBlock,
        key: Int[Tensor, ""] | None = None,
    ) -> Float[Tensor, "B T C"]:
        x = self.wte(tokens) + self.wpe(positions)
        # Blocks run in the dtype of their weights. Embeddings may be wider, so that the many small gradients
        # of a frequent token still add up.
        x = dropout(x.to(self.ln_f.weight.dtype), self.config.dropout, key, 0)
        for layer, block in enumerate(self.h):
            x = through_block(layer, block, x)
        return self.ln_f(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.rate = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Float[Tensor, "B T C"], attend: Attend, key: Int[Tensor, ""] | None = None
    ) -> Float[Tensor, "B T C"]:
        x = x + dropout(self.attn(self.ln_1(x), attend), self.rate, key, 1)
        return x + dropout(self.mlp(self.ln_2(x)), self.rate, key, 2)


class SelfAttention(nn.Module):
    """Multi-head attention; `attend` decides which positions see which."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "B T C"], attend: Attend) -> Float[Tensor, "B T C"]:
        q_BHTD, k_BHTD, v_BHTD = (
            rearrange(part, "B T (H D) -> B H T D", H=self.n_head) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        return self.c_proj(rearrange(attend(q_BHTD, k_BHTD, v_BHTD), "B H T D -> B T (H D)"))


class MLP(nn.Module):
    """Two linear maps with a GELU in between; F = 4 C hidden features."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.c_proj(gelu(self.c_fc(x)))


class Embedding(nn.Module):
    """One row of weights per id. PyTorch's own is slow to make: it draws values even on the meta device."""

    def __init__(self, n_ids: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ids, n_out))

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... C"]:
        return F.embedding(ids, self.weight)


class Linear(nn.Module):
    """x W + b, with W stored [in, out] as in OpenAI's release."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if not adds_bias_later(x):
            return F.linear(x, self.weight.t(), self.bias)
        # Expanding the bias before the product makes backward sum its gradient after the product's, from the
        # array that the product has just read.
        bias = self.bias.expand(*x.shape[:-1], -1)
        return ((x @ self.weight).float() + bias).to(x.dtype)


def adds_bias_later(x: Tensor) -> bool:
    """Whether to add the bias after the product of `x`, in fp32: true in a CPU graph in half precision.

    There a product that adds the bias itself takes up to a fifth longer, because PyTorch first copies the
    bias to every row; the kernel after the product adds it on the way.
    """
    on_cpu = torch.compiler.is_compiling() and x.device.type == "cpu"
    return on_cpu and x.dtype != torch.float32


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks and Gimpel 2016) that OpenAI's code uses: x (1 + tanh u) / 2.

    A compiled graph computes the equal x sigmoid(2 u): an exponential costs a CPU half as much as a tanh.
    Eager code does not, since autograd would save five tensors instead of one.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def causal_attention_with_dropout(
    q_BHTD: Float[Tensor, "B H T D"],
    k_BHTD: Float[Tensor, "B H T D"],
    v_BHTD: Float[Tensor, "B H T D"],
    rate: float,
    key: Int[Tensor, ""],
    site: int,
) -> Float[Tensor, "B H T D"]:
    """Causal attention with dropped probabilities, T x T of them in memory: no fused kernel takes a key."""
    T, D = q_BHTD.shape[-2:]
    scores = torch.einsum("bhtd,bhsd->bhts", q_BHTD, k_BHTD) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).triu(1)
    probabilities = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhts,bhsd->bhtd", dropout(probabilities, rate, key, site), v_BHTD)


def dropout(x: Tensor, rate: float, key: Int[Tensor, ""] | None, site: int) -> Tensor:
    """x with a fraction `rate` zeroed and the rest scaled by 1 / (1 - rate); x itself without a key.

    `site` numbers the places that drop features under one key, so that each gets a mask of its own.
    """
    if key is None:
        return x
    return (x / (1 - rate)).masked_fill(~keep_mask(x, rate, fold_in(key, site)), 0)


def keep_mask(x: Tensor, rate: float, key: Int[Tensor, ""]) -> Bool[Tensor, "..."]:
    """True with probability 1 - rate; depends on (key, position in x) alone.

    Integer arithmetic, so every device draws the same mask, compiled or not.
    """
    position = torch.arange(x.numel(), device=x.device).view(x.shape)
    return mix(mix(position) ^ key) >= int(rate * 2**31)


def fold_in(key: Int[Tensor, ""], data: int | Int[Tensor, ""]) -> Int[Tensor, ""]:
    """A new key from a key and a number, like `jax.random.fold_in`."""
    return mix(key * 0x01000193 + data)


def mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """31 well-mixed bits of each int64, as int64. Source: the "lowbias32" integer hash of Wellons 2018."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >> 1
