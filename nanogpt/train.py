"""One training step as a pure function, `(state, batch) -> (state, metrics)`.

No clock, file, rank or print here: the caller owns every side effect.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nanogpt import sharding, tree
from nanogpt.attention import Attention, in_a_graph
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.graph import as_one_graph
from nanogpt.loss import DEFAULT_CHUNK_TOKENS, HeadLoss, chunk_loss, chunk_loss_and_grads, head_loss
from nanogpt.model import (
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
    require_leaves,
)
from nanogpt.optim import LossScaleState, OptState, Transform
from nanogpt.update import make_update

Precision = Literal["bfloat16", "float16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EMBEDDINGS = ("wte.weight", "wpe.weight")

Metrics = dict[str, Tensor]
"""0-d fp32 tensors, still on the device: "loss" and "grad_norm" (before clipping)."""

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
CallBlock = Callable[..., Tensor]
"""`(layer, function, *arguments)` to `function(that layer's parameters, *arguments)`."""

Loss = Callable[..., Tensor]
"""What `make_loss` returns."""
ValueAndGrad = Callable[[Params, Batch, Int[Tensor, ""], Float[Tensor, ""]], tuple[Float[Tensor, ""], Params]]
EvalStep = Callable[[Params, Batch], Float[Tensor, ""]]


class TrainState(NamedTuple):
    """All that a run is at a step, and all that a checkpoint holds: the data follow from `step`."""

    step: Int[Tensor, ""]
    params: Params
    opt_state: OptState


def init_state(
    config: GPT2Config, optimizer: Transform, generator: torch.Generator, *, mesh: DeviceMesh | None = None
) -> TrainState:
    """Step 0 with fresh parameters on the generator's device; on a mesh this rank's rows of the same."""
    place = functools.partial(sharding.place, mesh=mesh) if mesh else lambda leaf: leaf
    params = init(config, generator, place=place)
    step = torch.zeros((), dtype=torch.int64, device=generator.device)
    opt_state = tree.map(sharding.added_up, optimizer.init(params))
    # An optimizer's averaged parameters may start as the parameters themselves, or two moments as the same
    # zeros. They must not share memory: a donated step would overwrite both.
    own = tree.apart(sharding.local(opt_state), sharding.local(params))
    return TrainState(step, params, tree.map(sharding.wrap, own, opt_state))


def make_train_step(
    config: GPT2Config,
    optimizer: Transform,
    *,
    mesh: DeviceMesh | None = None,
    precision: Precision = "bfloat16",
    seed: int = 0,
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    reshard_after_forward: bool = False,
    donate: bool = False,
    compile: bool = True,
) -> TrainStep:
    """A pure `(state, batch) -> (state, metrics)`: gradient, then `optimizer`, then the new state.

    Master parameters stay fp32; `precision` is the dtype of the matrix products. Dropout masks depend on
    `seed`, the step and the microstep. With `donate` the new state takes over the memory of the old one,
    which must not be read again (like `donate_argnums` in JAX). With `compile` the step consists of a few
    graphs, each compiled at its first call and shared by all layers; without, the same code runs eagerly, and
    `torch.compile(step, fullgraph=True)` turns it into a single graph, in minutes. On a `mesh` the state
    holds DTensors, the batch is this rank's part, and the metrics cover all ranks. Every target has to be an
    id of the vocabulary. `torch.func.vmap` maps an eager step, over states, batches or settings of
    `optimizer`.
    """
    check_precision(precision)
    value_and_grad = make_value_and_grad(
        config,
        mesh=mesh,
        precision=precision,
        attention=attention,
        loss_chunk_tokens=loss_chunk_tokens,
        reshard_after_forward=reshard_after_forward,
        compile=compile,
    )
    update = make_update(optimizer, donate=donate, compile=compile)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = fold_in(torch.full_like(state.step, seed), state.step)
        scale = loss_scale(state.opt_state, precision, state.step.device)
        loss, grads = value_and_grad(state.params, batch, key, scale)
        norm = sharding.whole(tree.global_norm(grads))
        metrics = {"loss": loss, "grad_norm": norm / scale}
        params, opt_state = update(grads, norm, state.opt_state, state.params)
        step = state.step.add_(1) if donate else state.step + 1
        return TrainState(step, params, opt_state), metrics

    return train_step


def make_value_and_grad(
    config: GPT2Config,
    *,
    mesh: DeviceMesh | None = None,
    precision: Precision = "bfloat16",
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    reshard_after_forward: bool = False,
    compile: bool = False,
) -> ValueAndGrad:
    """`(params, batch, dropout_key, scale) -> (loss, gradients of scale * loss)` over all microbatches.

    Both are fp32; gradients have the names of `params`. On a `mesh` both are means over the ranks' batches,
    and gradients are laid out like `params`. Differentiating them again raises: for second derivatives take
    `torch.func.grad` of `next_token_loss(apply(..., attention="math"), ...)`.
    """
    loss = make_loss(
        config, precision=precision, attention=attention, loss_chunk_tokens=loss_chunk_tokens, compile=compile
    )
    if mesh is not None:
        bound = bind(config, mesh, precision=precision, reshard_after_forward=reshard_after_forward)
        return make_sharded_value_and_grad(loss, bound, mesh)
    grad_and_value = (taped_grad_and_value if compile else torch.func.grad_and_value)(loss)

    def value_and_grad(params: Params, batch: Batch, key: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
        def microstep(a: int):  # unannotated: torch.compile cannot trace a subscripted type here
            return grad_and_value(params, batch.inputs[a], batch.targets[a], fold_in(key, a), scale / A)

        require_tokens(batch)
        A = len(batch.inputs)
        grads, total = microstep(0)
        for a in range(1, A):
            more, value = microstep(a)
            grads, total = tree.map(torch.Tensor.add_, grads, more), total + value
            del more  # free it before the next microstep allocates its own
        return total / scale, grads

    return value_and_grad


def make_sharded_value_and_grad(loss: Loss, bound: sharding.Bound, mesh: DeviceMesh) -> ValueAndGrad:
    """The body of `make_value_and_grad` on a mesh: bind, backward, collect.

    `torch.func` sees neither inside DTensors nor the parameters that FSDP2 computes with. Each rank has
    dropout masks of its own.
    """

    def value_and_grad(params: Params, batch: Batch, key: Tensor, scale: Tensor) -> tuple[Tensor, Params]:
        require_tokens(batch)
        A, key, total = len(batch.inputs), fold_in(key, mesh.get_rank()), torch.zeros_like(scale)
        bound.bind(params)
        for a, (inputs, targets) in enumerate(zip(*batch, strict=True)):
            bound.reduce_gradients(a == A - 1)
            arguments = inputs, targets, fold_in(key, a), scale / A, bound.call_block
            value = bound.call(loss, *arguments)
            value.backward()
            total = total + value.detach()
        return sharding.mean_over_ranks(total, mesh) / scale, bound.collect()

    return value_and_grad


def bind(
    config: GPT2Config, mesh: DeviceMesh, *, precision: Precision, reshard_after_forward: bool = False
) -> sharding.Bound:
    """FSDP2's modules for the parameters of `config`: one per block, and one for the rest."""
    shapes: Params = dict(config.skeleton.named_parameters())
    return sharding.Bound(
        shapes,
        *block_names(shapes),
        mesh,
        dtype=DTYPES[precision],
        reshard_after_forward=reshard_after_forward,
    )


def make_loss(
    config: GPT2Config, *, precision: Precision, attention: Attention, loss_chunk_tokens: int, compile: bool
) -> Loss:
    """`(params, inputs, targets, dropout_key, scale) -> scale * mean loss` of one microbatch, differentiable.

    With `compile` two graphs do nearly all the work: one block, which every layer calls with its own
    parameters, and one chunk of the head. An optional sixth argument, a `CallBlock`, supplies blocks'
    parameters from elsewhere than `params`.
    """
    dtype, _ = DTYPES[precision], config.skeleton

    def block(params: Params, x: Tensor, key: Tensor | None) -> Tensor:
        kernel = in_a_graph(attention, x) if compile else attention
        return apply_block(cast(params, dtype), x, config, dropout_key=key, attention=kernel)

    chunk = chunk_loss_and_grads
    if compile:
        block, chunk = as_one_graph(block), as_one_graph(chunk)
    settings = dict(vocab_size=config.vocab_size, chunk_tokens=loss_chunk_tokens, chunk=chunk)

    def loss(
        params: Params,
        inputs: Tensor,
        targets: Tensor,
        key: Tensor,
        scale: Tensor,
        call_block: CallBlock | None = None,
    ) -> Tensor:
        call = from_tree(params, config) if call_block is None else call_block

        def through_block(layer: int, _: nn.Module, x: Tensor) -> Tensor:
            return call(layer, block, x, block_key(key, layer) if config.dropout else None)

        features = apply_trunk(
            cast_outside(params, dtype), inputs, config, dropout_key=key, through_block=through_block
        )
        head = head_in(dtype, params, config).detach()
        return HeadLoss.apply(features, params["wte.weight"], targets, scale, head, settings)[0]

    return loss


def from_tree(params: Params, config: GPT2Config) -> CallBlock:
    """A `CallBlock` that takes each block's parameters from `params`, which must hold all leaves."""
    require_leaves(params, config)
    return lambda layer, function, *arguments: function(block_params(params, layer), *arguments)


def taped_grad_and_value(function: Callable[..., Tensor]) -> Callable[..., tuple[Params, Tensor]]:
    """Like `torch.func.grad_and_value`, which cannot see into compiled functions, but by autograd's tape."""

    def grad_and_value(params: Params, *arguments: Any) -> tuple[Params, Tensor]:
        if tree.in_a_transform():
            raise UserError("torch.func cannot transform a compiled step; make it with compile=False")
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        for leaf in leaves.values():  # told that it stays, a graph saves no narrow copy for the backward pass
            torch._dynamo.mark_static_address(leaf, guard=False)
        with torch.enable_grad():
            value = function(leaves, *arguments)
        grads = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), value.detach()

    return grad_and_value


def cast(params: Params, dtype: torch.dtype) -> Params:
    """All parameters in `dtype`."""
    return {name: leaf.to(dtype) for name, leaf in params.items()}


def cast_outside(params: Params, dtype: torch.dtype) -> Params:
    """The parameters outside of the blocks: the final norm in `dtype`, the embeddings unchanged.

    A frequent token sums many gradients: with 8 bits of mantissa the sum would stop growing.
    """
    outside = {name: leaf for name, leaf in params.items() if not name.startswith("h.")}
    return {name: leaf if name in EMBEDDINGS else leaf.to(dtype) for name, leaf in outside.items()}


def head_in(dtype: torch.dtype, params: Params, config: GPT2Config) -> Float[Tensor, "P C"]:
    """The padded head in `dtype`; cast before it is padded, so that padding copies the narrow matrix."""
    return padded_head({"wte.weight": params["wte.weight"].to(dtype)}, config)


def make_eval_step(
    config: GPT2Config,
    *,
    mesh: DeviceMesh | None = None,
    precision: Precision = "bfloat16",
    attention: Attention = "auto",
    loss_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    compile: bool = True,
) -> EvalStep:
    """`(params, batch) -> summed loss` by the training step's network, of all targets except those of -100.

    On a `mesh`, `batch` is this rank's part and the sum is over all ranks.
    """
    check_precision(precision)
    dtype, _ = DTYPES[precision], config.skeleton

    def block(params: Params, x: Tensor) -> Tensor:
        kernel = in_a_graph(attention, x) if compile else attention
        return apply_block(cast(params, dtype), x, config, attention=kernel)

    chunk = chunk_loss
    if compile:
        block, chunk = as_one_graph(block), as_one_graph(chunk)

    def summed_loss(
        params: Params, inputs: Tensor, targets: Tensor, call_block: CallBlock | None = None
    ) -> Tensor:
        call = from_tree(params, config) if call_block is None else call_block

        def through_block(layer: int, _: nn.Module, x: Tensor) -> Tensor:
            return call(layer, block, x)

        return head_loss(
            apply_trunk(cast_outside(params, dtype), inputs, config, through_block=through_block),
            head_in(dtype, params, config),
            targets,
            vocab_size=config.vocab_size,
            chunk_tokens=loss_chunk_tokens,
            chunk=chunk,
        )

    def eval_step(params: Params, batch: Batch) -> Float[Tensor, ""]:
        require_tokens(batch)
        return torch.stack([summed_loss(params, *part) for part in zip(*batch, strict=True)]).sum()

    if mesh is None:
        return eval_step
    bound = bind(config, mesh, precision=precision)

    @torch.no_grad()  # FSDP2's own parameters require gradients
    def sharded_eval_step(params: Params, batch: Batch) -> Float[Tensor, ""]:
        require_tokens(batch)
        bound.bind(params)
        losses = [bound.call(summed_loss, *part, bound.call_block) for part in zip(*batch, strict=True)]
        bound.release()
        return sharding.sum_over_ranks(torch.stack(losses).sum(), mesh)

    return sharded_eval_step


def require_tokens(batch: Batch) -> None:
    """Raises UserError unless there are tokens and each has a target: other shapes pair up wrongly."""
    inputs, targets = batch
    if inputs.shape != targets.shape:
        raise UserError(
            f"the targets of a batch have shape {list(targets.shape)}, its inputs {list(inputs.shape)}, "
            f"expected [A, B, T] for both; give each token its target"
        )
    if inputs.numel() == 0:
        raise UserError(f"a batch of shape {list(inputs.shape)} has no tokens, expected at least one")


def check_precision(precision: str) -> None:
    """Raises UserError unless `precision` is one of `DTYPES`."""
    if precision not in DTYPES:
        raise UserError(
            f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}; "
            f"set --train.precision"
        )


def loss_scale(opt_state: OptState, precision: Precision, device: torch.device) -> Float[Tensor, ""]:
    """What the loss is multiplied by before the backward pass: 1 unless the optimizer scales for float16."""
    if isinstance(opt_state, LossScaleState):
        return opt_state.scale
    if precision == "float16":
        raise UserError(
            "float16 gradients underflow without loss scaling; wrap the optimizer in dynamic_loss_scale"
        )
    return torch.ones((), device=device)
