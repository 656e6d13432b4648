"""Cross-entropy of the next token, chunk by chunk: the logits of a long batch never all exist in fp32."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nanogpt import tree
from nanogpt.attention import CPU
from nanogpt.errors import UserError

IGNORED = -100  # cross-entropy leaves such a target out
DEFAULT_CHUNK_TOKENS = 1024
NARROW_CHUNK_TOKENS = 2048
"""As many bytes of 16-bit logits. Only AMX multiplies larger chunks faster, see benchmarks/NOTES.md."""
GPU_CHUNK_TOKENS = 8192
"""Twice as many need twice the memory and are no faster, measured on an H100: see benchmarks/NOTES.md."""
PRODUCT_ROWS = 4096
"""Rows of the head's gradient that a CPU adds to at a time: fewer multiply slower, more leave the cache."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""`chunk_loss_and_grads`, or its compiled form."""


def chunk_tokens_of(device_type: str, precision: str) -> int:
    """Number of tokens whose logits exist at a time in a step of this `precision`."""
    if device_type == "cuda":
        return GPU_CHUNK_TOKENS
    gains = precision != "float32" and CPU.get("amx_bf16", False)
    return NARROW_CHUNK_TOKENS if gains else DEFAULT_CHUNK_TOKENS


def next_token_loss(
    logits: Float[Tensor, "... V"], targets: Int[Tensor, "..."], *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of `targets` in nats, in fp32; one chunk of rows is widened at a time.

    Targets of -100 are left out, as in `torch.nn.functional.cross_entropy`. Raises UserError unless each row
    of logits has one target.
    """
    if logits.shape[:-1] != targets.shape:
        raise UserError(
            f"the targets have shape {list(targets.shape)}, expected {list(logits.shape[:-1])} for logits of "
            f"shape {list(logits.shape)}; give each row of logits its target"
        )
    rows, ids = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    chunks = zip(rows.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    total = sum(F.cross_entropy(row.float(), target, reduction="sum") for row, target in chunks)
    return torch.as_tensor(total) / (ids != IGNORED).sum()


def head_loss(
    features: Float[Tensor, "B T C"],
    head: Float[Tensor, "P C"],
    targets: Int[Tensor, "B T"],
    *,
    vocab_size: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    chunk: Callable[..., Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Summed loss of `features @ head.T` in nats; without a tape one chunk's logits exist at a time.

    Targets of -100 are left out, so a last batch can be padded with them. `chunk` is `chunk_loss` or its
    compiled form.
    """
    rows, ids = features.flatten(0, 1), targets.flatten()
    chunks = zip(rows.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    loss_of = chunk_loss if chunk is None else chunk
    losses = [loss_of(row, head, target, vocab_size) for row, target in chunks]
    return torch.stack(losses).sum()


def head_loss_and_grads(
    features: Float[Tensor, "B T C"],
    head: Float[Tensor, "P C"],
    targets: Int[Tensor, "B T"],
    *,
    vocab_size: int,
    scale: float | Float[Tensor, ""] = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    chunk: ChunkLoss | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B T C"], Float[Tensor, "P C"]]:
    """The mean loss, and the gradients of scale * loss by features and, in fp32, by head.

    Each chunk's logits are made, differentiated and freed before the next chunk's: nothing of size [B T V] is
    saved for a backward pass, and nothing is computed twice. `chunk` is `chunk_loss_and_grads` or its
    compiled form; the head's gradient is summed outside of it, where a product can be added in place. Every
    target has to be an id of the vocabulary: none is left out here.
    """
    rows, ids = features.flatten(0, 1), targets.flatten()
    weight = torch.as_tensor(scale / ids.numel(), dtype=torch.float32, device=features.device)
    loss_and_grads = chunk_loss_and_grads if chunk is None else chunk
    losses, row_grads, head_grad = [], [], None
    for row, target in zip(rows.split(chunk_tokens), ids.split(chunk_tokens), strict=True):
        loss, row_grad, logits_grad = loss_and_grads(row, head, target, weight, vocab_size)
        head_grad = add_product(head_grad, logits_grad.t(), row)
        del logits_grad  # before the next chunk's logits are made
        losses.append(loss)
        row_grads.append(row_grad)
    assert head_grad is not None
    return torch.stack(losses).sum() / ids.numel(), torch.cat(row_grads).view(features.shape), head_grad


def add_product(total: Float[Tensor, "P C"] | None, a: Tensor, b: Tensor) -> Float[Tensor, "P C"]:
    """total + a @ b in fp32, written over `total`; None stands for zero."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if a.device.type == "cuda":  # cuBLAS multiplies 16-bit matrices into an fp32 result
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if total is None:
        total, write = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32), Tensor.copy_
    else:
        write = Tensor.add_
    # A CPU's sum of two dtypes widens the product in memory first: of some rows at a time it stays in cache.
    rows_at_a_time = PRODUCT_ROWS if a.device.type == "cpu" else a.shape[0]
    for rows, part in zip(total.split(rows_at_a_time), a.split(rows_at_a_time), strict=True):
        write(rows, part @ b)
    return total


def chunk_loss_and_grads(
    row: Float[Tensor, "N C"],
    head: Float[Tensor, "P C"],
    target: Int[Tensor, "N"],
    weight: Float[Tensor, ""],
    vocab_size: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N C"], Float[Tensor, "N P"]]:
    """Summed loss of N tokens, and the gradients of weight * loss by `row` and by the logits.

    Written out because it is short: the gradient of a cross-entropy by the logits is softmax minus one-hot.
    Padded columns get no probability and a gradient of 0. On a GPU the product adds a bias of minus infinity
    to them for free; every pass then covers the same columns, so all of them fuse into one kernel that finds
    each row still in cache. A CPU's product would first write the bias to every row, so there the sums skip
    these columns and the gradient masks them.
    """
    columns = torch.arange(head.shape[0], dtype=torch.int32, device=head.device)
    if row.device.type == "cpu":
        logits = F.linear(row, head).float()
        words, weight = logits[:, :vocab_size], torch.where(columns < vocab_size, weight, 0.0)
    else:
        bias = torch.where(columns < vocab_size, 0.0, -math.inf).to(row.dtype)
        words = logits = F.linear(row, head, bias).float()
    top = words.amax(-1, keepdim=True)  # not torch.logsumexp: its handling of infinities costs a pass
    log_total = (words - top).exp().sum(-1, keepdim=True).log() + top
    loss = (log_total - words.gather(1, target[:, None])).sum()  # on a CPU a padded id is out of bounds
    one_hot = (columns == target[:, None].int()).float()
    logits_grad = (((logits - log_total).exp() - one_hot) * weight).to(row.dtype)
    return loss, logits_grad @ head, logits_grad


class HeadLoss(torch.autograd.Function):
    """`head_loss_and_grads` as a differentiable function of the features and the token embedding.

    `HeadLoss.apply(features, embedding, targets, scale, head, settings)[0]` is scale * mean loss. `head` is
    the embedding, padded and in the compute dtype, but the gradient goes to `embedding` in fp32: passed back
    through the cast it would lose the bits that the sum over chunks has kept.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        embedding: Tensor,
        targets: Tensor,
        scale: Tensor,
        head: Tensor,
        settings: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, features_grad, head_grad = head_loss_and_grads(features, head, targets, scale=scale, **settings)
        return loss * scale, features_grad, head_grad[: embedding.shape[0]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *of_grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  torch passes one an output, declares one
        # Without this error the gradients would silently count as constants. (A tracer passes all
        # cotangents.)
        again = any(part is not None for part in of_grads) and not torch.compiler.is_compiling()
        if cotangent is None or again:
            raise NotImplementedError(
                "this loss has no second derivative; differentiate "
                'next_token_loss(apply(..., attention="math"), ...) instead'
            )
        features_grad, embedding_grad = ctx.saved_tensors
        if not torch.is_grad_enabled():  # a block's compiled backward accepts only what is not differentiated
            features_grad, embedding_grad = features_grad.detach(), embedding_grad.detach()
        if not is_one(cotangent):
            features_grad = features_grad * cotangent
            embedding_grad = embedding_grad * cotangent
        return features_grad, embedding_grad, None, None, None, None


def is_one(cotangent: Float[Tensor, ""]) -> bool:
    """Whether it is known to be 1, as in every step; a CPU then saves a pass over the head's gradient.

    Asking a GPU would mean waiting for it; in a graph there is no value to ask for, and under `vmap` many.
    """
    has_value = type(cotangent) is Tensor and not torch.compiler.is_compiling()
    if not has_value or cotangent.device.type != "cpu" or tree.is_mapped(cotangent):
        return False
    return cotangent.item() == 1


def chunk_loss(
    row: Float[Tensor, "N C"], head: Float[Tensor, "P C"], target: Int[Tensor, "N"], vocab_size: int
) -> Float[Tensor, ""]:
    """Summed loss of N tokens. Padded columns are cut off before the softmax, so they get no probability."""
    return F.cross_entropy(F.linear(row, head)[:, :vocab_size].float(), target, reduction="sum")
