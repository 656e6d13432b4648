"""One training step as a pure function, `(state, batch) -> (state, metrics)`.

No clock, file, rank or print in here: the caller owns every effect.
"""

import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nanogpt import optim, tree
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.loss import DEFAULT_CHUNK_TOKENS, HeadLoss, chunk_loss, chunk_loss_and_grads, head_loss
from nanogpt.model import (
    Attention,
    GPT2Config,
    Params,
    apply_block,
    apply_trunk,
    block_key,
    block_names,
    block_params,
    fold_in,
    init,
    padded_head,
)
from nanogpt.optim import LossScaleState, OptState, Scaling, Transform, apply_updates
from nanogpt.tree import Tree

Precision = Literal["bfloat16", "float16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EMBEDDINGS = ("wte.weight", "wpe.weight")

Metrics = dict[str, Tensor]
"""0-d fp32 tensors that still live on the device: "loss" and "grad_norm" (before clipping)."""

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
Loss = Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor]
Update = Callable[[Params, OptState, Params], tuple[Params, OptState]]
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
    one, which must not be read again (as `donate_argnums` in JAX). With `compile` the step is made of a few
    graphs, each compiled at its first call and used for every layer; without, the same code runs eagerly, and
    `torch.compile(step, fullgraph=True)` makes one graph of it, in minutes.
    """
    check_precision(precision)
    value_and_grad = make_value_and_grad(
        config, precision=precision, attention=attention, loss_chunk_tokens=loss_chunk_tokens, compile=compile
    )
    update = make_update(optimizer, donate=donate, compile=compile)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = fold_in(torch.full_like(state.step, seed), state.step)
        scale = loss_scale(state.opt_state, precision)
        loss, grads = value_and_grad(state.params, batch, key, scale)
        metrics = {"loss": loss, "grad_norm": tree.global_norm(grads) / scale}
        params, opt_state = update(grads, state.opt_state, state.params)
        step = state.step.add_(1) if donate else state.step + 1
        return TrainState(step, params, opt_state), metrics

    return train_step


def make_value_and_grad(
    config: GPT2Config,
    *,
    precision: Precision = "bfloat16",
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    compile: bool = False,
) -> ValueAndGrad:
    """`(params, batch, dropout_key, scale) -> (loss, gradients of scale * loss)` over all microbatches.

    Loss and gradients are fp32 and have the names of `params`.
    """
    loss = make_loss(
        config, precision=precision, attention=attention, loss_chunk_tokens=loss_chunk_tokens, compile=compile
    )
    grad_and_value = (taped_grad_and_value if compile else torch.func.grad_and_value)(loss)

    def value_and_grad(params: Params, batch: Batch, key: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
        def microstep(a: int):  # no `tuple[...]` here: torch.compile would have to subscript a type
            return grad_and_value(params, batch.inputs[a], batch.targets[a], fold_in(key, a), scale / A)

        A = len(batch.inputs)
        grads, total = microstep(0)
        for a in range(1, A):
            more, value = microstep(a)
            grads, total = tree.map(torch.Tensor.add_, grads, more), total + value
        return total / scale, grads

    return value_and_grad


def make_loss(
    config: GPT2Config, *, precision: Precision, attention: Attention, loss_chunk_tokens: int, compile: bool
) -> Loss:
    """`(params, inputs, targets, dropout_key, scale) -> scale * mean loss` of one microbatch, differentiable.

    With `compile` two graphs do nearly all of it: one block, which every layer calls with its own parameters,
    and one chunk of the head.
    """
    dtype, _ = DTYPES[precision], config.skeleton

    def block(params: Params, x: Tensor, key: Tensor | None) -> Tensor:
        return apply_block(cast(params, dtype), x, config, dropout_key=key, attention=attention)

    chunk = chunk_loss_and_grads
    if compile:
        block, chunk = as_one_graph(block), as_one_graph(chunk)
    settings = dict(vocab_size=config.vocab_size, chunk_tokens=loss_chunk_tokens, chunk=chunk)

    def loss(params: Params, inputs: Tensor, targets: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        def through_block(layer: int, _: nn.Module, x: Tensor) -> Tensor:
            return block(block_params(params, layer), x, block_key(key, layer) if config.dropout else None)

        features = apply_trunk(
            cast_outside(params, dtype), inputs, config, dropout_key=key, through_block=through_block
        )
        head = padded_head(params, config).detach().to(dtype)
        return HeadLoss.apply(features, params["wte.weight"], targets, scale, head, settings)[0]

    return loss


def taped_grad_and_value(function: Callable[..., Tensor]) -> Callable[..., tuple[Params, Tensor]]:
    """As `torch.func.grad_and_value`, which cannot look into compiled functions: by autograd's tape."""

    def grad_and_value(params: Params, *arguments: Any) -> tuple[Params, Tensor]:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        with torch.enable_grad():
            value = function(leaves, *arguments)
        grads = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), value.detach()

    return grad_and_value


def as_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call, with a count of recompilations of its own.

    torch.compile keeps graphs by code object. Without a copy of it two steps made of one source would share
    them, and with the ninth model in a process the limit of recompilations would be reached.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False)


def cast(params: Params, dtype: torch.dtype) -> Params:
    """All of them in `dtype`."""
    return {name: leaf.to(dtype) for name, leaf in params.items()}


def cast_outside(params: Params, dtype: torch.dtype) -> Params:
    """What is outside of the blocks, the final norm in `dtype` and the embeddings as they are.

    The gradients of a frequent token are many: in 8 bits of mantissa their sum would stop growing.
    """
    outside = {name: leaf for name, leaf in params.items() if not name.startswith("h.")}
    return {name: leaf if name in EMBEDDINGS else leaf.to(dtype) for name, leaf in outside.items()}


def make_update(optimizer: Transform, *, donate: bool, compile: bool) -> Update:
    """`(grads, opt_state, params) -> (params, opt_state)`; with `donate` in the memory of the old ones.

    With `compile` an optimizer that `optim.split` can take apart, as clipped AdamW, goes through the tree
    block by block: one graph reads a block's gradients, moments and parameters once, writes them once, and
    serves all layers. Any other optimizer runs eagerly.
    """
    parts = optim.split(optimizer) if compile else None
    if parts is not None:
        return make_update_by_block(*parts, donate=donate)

    def update(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = apply_updates(params, updates), new_opt_state
        return tree.overwrite((params, opt_state), new) if donate else new

    return update


def make_update_by_block(scaling: Scaling | None, leafwise: Transform, *, donate: bool) -> Update:
    """The compiled body of `make_update`."""

    def update_part(factor: Tensor, grads: Params, opt_state: OptState, params: Params):
        updates = tree.map(lambda g: g * factor, grads)
        updates, new_opt_state = leafwise.update(updates, opt_state, params)
        new = apply_updates(params, updates), new_opt_state
        return tree.overwrite_slots((params, opt_state), new, params) if donate else new

    update_block, update_outside = as_one_graph(update_part), as_one_graph(update_part)

    def update(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        state = opt_state if scaling is None else opt_state[1:]
        factor = ones_like(params) if scaling is None else scaling.factor(grads)
        blocks, outside = block_names(params)
        parts = []
        for names in (*blocks, outside):
            part = [tree.pick(whole, params, names) for whole in (grads, state, params)]
            parts.append((names, (update_outside if names is outside else update_block)(factor, *part)))
        new_params, new_state = tree.join((params, state), params, parts)
        if donate:  # slots are in their old place already; a count, which all parts have read, is not
            new_params, new_state = tree.overwrite((params, state), (new_params, new_state))
        return new_params, new_state if scaling is None else (opt_state[0], *new_state)

    return update


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

    def block(params: Params, x: Tensor) -> Tensor:
        return apply_block(cast(params, dtype), x, config, attention=attention)

    summed = chunk_loss
    if compile:
        block, summed = as_one_graph(block), as_one_graph(summed)

    @torch.no_grad()
    def eval_step(params: Params, batch: Batch) -> Float[Tensor, ""]:
        def through_block(layer: int, _: nn.Module, x: Tensor) -> Tensor:
            return block(block_params(params, layer), x)

        head = padded_head(params, config).to(dtype)
        total = torch.zeros((), device=head.device)
        for inputs, targets in zip(*batch, strict=True):
            features = apply_trunk(cast_outside(params, dtype), inputs, config, through_block=through_block)
            total = total + head_loss(
                features,
                head,
                targets,
                vocab_size=config.vocab_size,
                chunk_tokens=loss_chunk_tokens,
                chunk=summed,
            )
        return total

    return eval_step


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
    return ones_like(opt_state)


def ones_like(something: Tree) -> Float[Tensor, ""]:
    """The number 1 on the device of a tree."""
    return torch.ones((), device=tree.leaves(something)[0].device)
