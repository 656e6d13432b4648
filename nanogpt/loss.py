"""Cross-entropy of the next token, in chunks: the logits of a long batch never all exist in fp32."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value

DEFAULT_CHUNK_TOKENS = 1024


def next_token_loss(
    logits: Float[Tensor, "... V"], targets: Int[Tensor, "..."], *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of `targets` in nats, fp32, over chunks of rows widened in turn."""
    rows, ids = logits.flatten(0, -2), targets.flatten()
    chunks = zip(rows.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    total = sum(F.cross_entropy(row.float(), target, reduction="sum") for row, target in chunks)
    return torch.as_tensor(total) / ids.numel()


def head_loss(
    features: Float[Tensor, "B T C"],
    head: Float[Tensor, "P C"],
    targets: Int[Tensor, "B T"],
    *,
    vocab_size: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Float[Tensor, ""]:
    """Summed loss of `features @ head.T` in nats, no gradients, one chunk's logits in memory at a time.

    Targets of -100 are left out, so that a last batch can be filled up with them.
    """
    rows, ids = features.flatten(0, 1), targets.flatten()
    chunks = zip(rows.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    return torch.stack([_chunk_loss(row, head, target, vocab_size) for row, target in chunks]).sum()


def head_loss_and_grads(
    features: Float[Tensor, "B T C"],
    head: Float[Tensor, "P C"],
    targets: Int[Tensor, "B T"],
    *,
    vocab_size: int,
    scale: float | Float[Tensor, ""] = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B T C"], Float[Tensor, "P C"]]:
    """The mean loss and the gradients of scale * loss by features and, in fp32, by head.

    A chunk's logits are made, differentiated and forgotten before the next chunk's: nothing of size [B T V]
    is saved for a backward pass and nothing is computed twice.
    """
    rows, ids = features.flatten(0, 1), targets.flatten()
    weight = scale / ids.numel()

    def scaled(row: Tensor, head: Tensor, target: Tensor) -> Float[Tensor, ""]:
        return _chunk_loss(row, head, target, vocab_size) * weight

    losses, row_grads, head_grad = [], [], torch.zeros(head.shape, device=head.device)
    for row, target in zip(rows.split(chunk_tokens), ids.split(chunk_tokens), strict=True):
        (row_grad, chunk_head_grad), loss = grad_and_value(scaled, argnums=(0, 1))(row, head, target)
        losses.append(loss)
        row_grads.append(row_grad)
        head_grad = head_grad + chunk_head_grad
    return torch.stack(losses).sum() / scale, torch.cat(row_grads).view(features.shape), head_grad


def _chunk_loss(
    row: Float[Tensor, "N C"], head: Float[Tensor, "P C"], target: Int[Tensor, "N"], vocab_size: int
) -> Float[Tensor, ""]:
    """Summed loss of N tokens. Padded columns are cut off before the softmax, so they take no probability."""
    return F.cross_entropy(F.linear(row, head)[:, :vocab_size].float(), target, reduction="sum")
