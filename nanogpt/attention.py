"""Causal attention: PyTorch's kernels, and one of batched matrix products for CPUs on which those are slow.

PyTorch's CPU kernel multiplies the tiles of one head at a time, without the bfloat16 instructions of AVX-512;
batched products use them. So this one computes the scores of several heads for a few queries at once, little
enough to stay in cache until they are multiplied by the values. As in FlashAttention (Dao et al. 2022)
nothing of size T x T is saved: the backward pass computes the probabilities again.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.errors import UserError

Attention = Literal["auto", "flash", "cudnn", "efficient", "math", "products"]
"""Which kernel computes attention: one of PyTorch's fused ones, its reference ("math"), batched products, or
"auto": PyTorch's own choice, except that a compiled step takes products where they are known to be faster."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not tell
PRODUCTS_ARE_FASTER = CPU.get("avx512_bf16", False) and not CPU.get("amx_bf16", False)
TILE_QUERIES = 128
TILE_BYTES = 2 << 20  # of scores; the backward pass uses two such arrays at a time

softmax_gradient = torch.ops.aten._softmax_backward_data.out


def causal_attention(
    q_BHTD: Float[Tensor, "B H T D"],
    k_BHTD: Float[Tensor, "B H T D"],
    v_BHTD: Float[Tensor, "B H T D"],
    attention: Attention,
) -> Float[Tensor, "B H T D"]:
    """Causal attention by the chosen kernel; PyTorch raises RuntimeError if the device lacks it."""
    if attention == "products":
        scaled = q_BHTD * q_BHTD.shape[-1] ** -0.5  # exact for heads of 64 features: a power of two
        q_NTD, k_NTD, v_NTD = (part.flatten(0, 1).contiguous() for part in (scaled, k_BHTD, v_BHTD))
        return ByProducts.apply(q_NTD, k_NTD, v_NTD).view(q_BHTD.shape)
    if attention == "auto":
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
    if attention not in BACKENDS:
        raise UserError(
            f"no attention is called {attention!r}; expected one of {', '.join(get_args(Attention))}"
        )
    with sdpa_kernel(BACKENDS[attention]):
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


def in_a_graph(attention: Attention, x: Float[Tensor, "..."]) -> Attention:
    """The kernel of a compiled step on `x` for this `attention`: "auto" is products where they are faster.

    Products want their inputs laid out by head, which a graph does on the way. Outside of a compiled step
    "auto" stays PyTorch's choice, since a compiled `vmap` has no rule for products.
    """
    fits = PRODUCTS_ARE_FASTER and x.device.type == "cpu" and x.dtype == torch.bfloat16
    return "products" if attention == "auto" and fits else attention


def attention_by_products(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> Tensor:
    """Causal softmax(q k^T) v of N heads; inputs are contiguous [N, T, D], queries already scaled.

    Scores are rounded to the dtype before the softmax, as under autocast without a fused kernel: with scores
    of deviation 1 a bfloat16 output is 0.4 % off instead of 0.2 %.
    """
    out_NTD, future = torch.empty_like(q_NTD), future_of(q_NTD)
    for heads, rows, keys, (p,) in tiles(q_NTD, 1):
        make_probabilities(q_NTD[heads, rows], k_NTD[heads, keys].contiguous(), future, p)
        torch.bmm(p, v_NTD[heads, keys].contiguous(), out=out_NTD[heads, rows])
    return out_NTD


def gradients_by_products(
    grad_NTD: Tensor, q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by queries, keys and values, given `grad_NTD`, the gradient by attention's output."""
    dq_NTD, dk_NTD, dv_NTD = (torch.empty_like(part) for part in (q_NTD, k_NTD, v_NTD))
    future = future_of(q_NTD)
    for heads, rows, keys, (p, dp) in tiles(q_NTD, 2):
        # A product of a slice would copy it anyway, and slowly where it is transposed.
        q, grad = q_NTD[heads, rows].contiguous(), grad_NTD[heads, rows].contiguous()
        k, v = k_NTD[heads, keys].contiguous(), v_NTD[heads, keys].contiguous()
        make_probabilities(q, k, future, p)
        torch.bmm(grad, v.mT, out=dp)
        d_scores = softmax_gradient(dp, p, -1, p.dtype, grad_input=dp)  # goes row by row: safe in place
        torch.bmm(d_scores, k, out=dq_NTD[heads, rows])
        if keys.stop == k_NTD.shape[1]:  # the first tile of these heads: nothing to add to yet
            torch.bmm(d_scores.mT, q, out=dk_NTD[heads])
            torch.bmm(p.mT, grad, out=dv_NTD[heads])
        else:
            dk_NTD[heads, keys].baddbmm_(d_scores.mT, q)
            dv_NTD[heads, keys].baddbmm_(p.mT, grad)
    return dq_NTD, dk_NTD, dv_NTD


def tiles(q_NTD: Tensor, arrays: int) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """Yields (heads, queries, the keys these queries see, `arrays` buffers for their scores), tile by tile.

    The last queries come first. They see the most keys, so their tiles hold few heads; earlier ones hold
    more. All tiles share the same buffers.
    """
    N, T, _ = q_NTD.shape
    rows = min(TILE_QUERIES, T)
    fit = max(TILE_BYTES // q_NTD.itemsize, rows * T)  # at least one head
    memory = q_NTD.new_empty(arrays, min(fit, N * rows * T)).unbind()
    for begin in reversed(range(0, T, rows)):
        end = min(begin + rows, T)
        at_a_time = fit // ((end - begin) * end)
        for first in range(0, N, at_a_time):
            heads = slice(first, min(first + at_a_time, N))
            shape = heads.stop - first, end - begin, end
            scores = [part[: math.prod(shape)].view(shape) for part in memory]
            yield heads, slice(begin, end), slice(end), scores


def future_of(q_NTD: Tensor) -> Tensor:
    """The causal mask of a tile, added to its scores: minus infinity where a key comes after the query."""
    return q_NTD.new_full((TILE_QUERIES, TILE_QUERIES), -math.inf).triu_(1)


def make_probabilities(q: Tensor, k: Tensor, future: Tensor, p: Tensor) -> None:
    """Writes the probabilities to `p`: the last query sees all keys, each query before it one fewer."""
    R = q.shape[1]
    torch.bmm(q, k.mT, out=p)[..., -R:].add_(future[:R, :R])
    torch.softmax(p, -1, out=p)  # goes row by row: safe in place


def as_operator(schema: str, function: Callable[..., Any]) -> Any:
    """`function` as a PyTorch operator: a graph cannot trace such a loop, but can call an operator.

    Its results have the shapes of its last arguments. A dimension that `vmap` maps over becomes more heads.
    """
    name = f"nanogpt::{function.__name__}"
    torch.library.define(name, schema)
    torch.library.impl(name, "default", function)
    operator = getattr(torch.ops.nanogpt, function.__name__).default
    is_one = len(operator._schema.returns) == 1

    def shaped_like_inputs(*parts: Tensor) -> Any:
        return torch.empty_like(parts[0]) if is_one else tuple(map(torch.empty_like, parts[-3:]))

    def over_more_heads(info: Any, in_dims: tuple[int | None, ...], *parts: Tensor) -> tuple[Any, Any]:
        M = info.batch_size
        mapped = [
            part.expand(M, *part.shape) if dim is None else part.movedim(dim, 0)
            for part, dim in zip(parts, in_dims, strict=True)
        ]
        results = operator(*(part.flatten(0, 1).contiguous() for part in mapped))
        if is_one:
            return results.unflatten(0, (M, -1)), 0
        return tuple(part.unflatten(0, (M, -1)) for part in results), (0,) * len(results)

    torch.library.register_fake(name, shaped_like_inputs)
    torch.library.register_vmap(name, over_more_heads)
    return operator


ATTENTION = as_operator("(Tensor q, Tensor k, Tensor v) -> Tensor", attention_by_products)
GRADIENTS = as_operator(
    "(Tensor grad, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)", gradients_by_products
)


class ByProducts(torch.autograd.Function):
    """`attention_by_products`, differentiable by autograd and under `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor) -> Tensor:
        return ATTENTION(q_NTD, k_NTD, v_NTD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_NTD: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  torch passes one an output, declares one
        return ByProductsGradients.apply(grad_NTD.contiguous(), *ctx.saved_tensors)


class ByProductsGradients(torch.autograd.Function):
    """`gradients_by_products`, which has no derivative: as a bare operator it would count as a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_NTD: Tensor, q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return GRADIENTS(grad_NTD, q_NTD, k_NTD, v_NTD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError('attention by products has no second derivative; use attention="math"')
