"""One training step as a pure function, `(state, batch) -> (state, metrics)`.

No clock, file, rank or print in here: the caller owns every effect.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._higher_order_ops import while_loop

from nanogpt import tree
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.loss import DEFAULT_CHUNK_TOKENS, head_loss, head_loss_and_grads
from nanogpt.model import Attention, GPT2Config, Params, apply_trunk, fold_in, init, padded_head
from nanogpt.optim import LossScaleState, OptState, Transform, apply_updates

Precision = Literal["bfloat16", "float16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EMBEDDINGS = ("wte.weight", "wpe.weight")

Metrics = dict[str, Tensor]
"""0-d fp32 tensors that still live on the device: "loss" and "grad_norm" (before clipping)."""

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
ValueAndGrad = Callable[[Params, Batch, Int[Tensor, ""], Float[Tensor, ""]], tuple[Float[Tensor, ""], Params]]
EvalStep = Callable[[Params, Batch], Float[Tensor, ""]]


class TrainState(NamedTuple):
    """All that a run is at a step, and all that a checkpoint holds: the data follow from the step."""

    step: Int[Tensor, ""]
    params: Params
    opt_state: OptState


def init_state(config: GPT2Config, optimizer: Transform, generator: torch.Generator) -> TrainState:
    """Step 0 with fresh parameters, on the generator's device."""
    params = init(config, generator)
    step = torch.zeros((), dtype=torch.int64, device=generator.device)
    return TrainState(step, params, optimizer.init(params))


def make_train_step(
    config: GPT2Config,
    optimizer: Transform,
    *,
    mesh: None = None,
    precision: Precision = "bfloat16",
    seed: int = 0,
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    donate: bool = False,
    compile: bool = True,
) -> TrainStep:
    """A pure `(state, batch) -> (state, metrics)`: gradient, then `optimizer`, then the new state.

    Master parameters stay fp32; `precision` is what they are multiplied in. `seed` decides dropout masks,
    together with the step and the microstep. With `donate` the new state takes over the memory of the old
    one, which must not be read again (as `donate_argnums` in JAX). With `compile` the whole step is one
    `torch.compile(fullgraph=True)` graph, compiled at its first call; without, the same code runs eagerly.
    """
    check_precision(precision)
    value_and_grad = make_value_and_grad(
        config, precision=precision, attention=attention, loss_chunk_tokens=loss_chunk_tokens
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = fold_in(torch.full_like(state.step, seed), state.step)
        scale = loss_scale(state.opt_state, precision)
        loss, grads = value_and_grad(state.params, batch, key, scale)
        metrics = {"loss": loss, "grad_norm": tree.global_norm(grads) / scale}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(state.step + 1, apply_updates(state.params, updates), opt_state)
        return (overwrite(state, new_state) if donate else new_state), metrics

    return torch.compile(train_step, fullgraph=True, dynamic=False) if compile else train_step


def make_value_and_grad(
    config: GPT2Config,
    *,
    precision: Precision = "bfloat16",
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> ValueAndGrad:
    """`(params, batch, dropout_key, scale) -> (loss, gradients of scale * loss)` over all microbatches.

    Loss and gradients are fp32 and have the names of `params`. The network's gradient is one
    `torch.func.vjp`; the head is differentiated inside the chunked loss, which hands back the cotangent of
    the features.
    """
    dtype, _ = DTYPES[precision], config.skeleton

    def micro_grads(compute: Params, inputs: Tensor, targets: Tensor, key: Tensor, scale: Tensor):
        def trunk(compute: Params) -> Tensor:
            return apply_trunk(compute, inputs, config, dropout_key=key, attention=attention)

        features, pull_back = torch.func.vjp(trunk, compute)[:2]
        head = padded_head(compute, config).to(dtype)
        loss, features_grad, head_grad = head_loss_and_grads(
            features, head, targets, vocab_size=config.vocab_size, scale=scale, chunk_tokens=loss_chunk_tokens
        )
        (grads,) = pull_back(features_grad)
        grads = tree.map(lambda g: g.float(), grads)
        grads["wte.weight"] = grads["wte.weight"] + head_grad[: config.vocab_size]
        return loss, grads

    def value_and_grad(params: Params, batch: Batch, key: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
        compute = cast(params, dtype)
        A = batch.inputs.shape[0]

        def microstep(a: Tensor):  # no `tuple[...]` here: torch.compile would have to subscript a type
            inputs, targets = (part.index_select(0, a.view(1)).squeeze(0) for part in batch)
            return micro_grads(compute, inputs, targets, fold_in(key, a), scale / A)

        if A == 1:
            return micro_grads(compute, batch.inputs[0], batch.targets[0], fold_in(key, 0), scale)
        loss, grads = sum_over(microstep, A, (torch.zeros_like(scale), tree.map(torch.zeros_like, params)))
        return loss / A, grads

    return value_and_grad


def sum_over(function: Callable[[Tensor], tree.Tree], count: int, zeros: tree.Tree) -> tree.Tree:
    """function(0) + ... + function(count - 1), leaf by leaf.

    A compiled step gets a loop in its graph, so `function` is compiled once whatever `count` is.
    """

    def body(a: Tensor, *sums: Tensor):
        return a + 1, *(total + part for total, part in zip(sums, tree.leaves(function(a)), strict=True))

    sums = (torch.zeros((), dtype=torch.int64, device=tree.leaves(zeros)[0].device), *tree.leaves(zeros))
    if torch.compiler.is_compiling():
        sums = while_loop(lambda a, *_: a < count, body, sums)
    else:
        for _ in range(count):
            sums = body(*sums)
    return tree.unflatten(zeros, list(sums[1:]))


def cast(params: Params, dtype: torch.dtype) -> Params:
    """The parameters in the compute dtype, except the embeddings.

    The gradients of a frequent token are many: in 8 bits of mantissa their sum would stop growing.
    """
    return {name: leaf if name in EMBEDDINGS else leaf.to(dtype) for name, leaf in params.items()}


def make_eval_step(
    config: GPT2Config,
    *,
    precision: Precision = "bfloat16",
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    compile: bool = True,
) -> EvalStep:
    """`(params, batch) -> summed loss` of all targets but those of -100, by the training step's network."""
    check_precision(precision)
    dtype, _ = DTYPES[precision], config.skeleton

    @torch.no_grad()
    def eval_step(params: Params, batch: Batch) -> Float[Tensor, ""]:
        compute = cast(params, dtype)
        head = padded_head(compute, config).to(dtype)
        losses = [
            head_loss(
                apply_trunk(compute, inputs, config, attention=attention),
                head,
                targets,
                vocab_size=config.vocab_size,
                chunk_tokens=loss_chunk_tokens,
            )
            for inputs, targets in zip(batch.inputs, batch.targets, strict=True)
        ]
        return torch.stack(losses).sum()

    return torch.compile(eval_step, fullgraph=True, dynamic=False) if compile else eval_step


def check_precision(precision: str) -> None:
    """Raises UserError unless `precision` is one that a step can be made for."""
    if precision not in DTYPES:
        raise UserError(
            f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}; "
            f"set --train.precision"
        )


def loss_scale(opt_state: OptState, precision: Precision) -> Float[Tensor, ""]:
    """What the loss is multiplied by before the backward pass: 1 unless the optimizer scales for float16."""
    if isinstance(opt_state, LossScaleState):
        return opt_state.scale
    if precision == "float16":
        raise UserError(
            "float16 gradients underflow without loss scaling; wrap the optimizer in dynamic_loss_scale"
        )
    return torch.ones((), device=tree.leaves(opt_state)[0].device)


def overwrite(old: TrainState, new: TrainState) -> TrainState:
    """`old` with its memory holding the values of `new`."""
    return tree.map(lambda kept, value: kept.copy_(value), old, new)
