"""Every attention kernel computes the same; that of batched products in tiles, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanogpt import attention
from nanogpt.attention import Attention, causal_attention, in_a_graph
from nanogpt.errors import UserError


def random_parts(
    T: int, *, D: int = 8, dtype: torch.dtype = torch.float64, deviation: float = 1.0
) -> list[Tensor]:
    """Queries, keys and values of 2 x 3 heads, whose scores have this deviation, and a gradient."""
    q, k, v, grad = torch.randn(
        4, 2, 3, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return [part.to(dtype) for part in (q * deviation, k, v, grad)]


def with_gradients(
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> list[Tensor]:
    """The output, and the gradients of its product with `grad` by queries, keys and values."""
    parts = [part.clone().requires_grad_() for part in (q, k, v)]
    out = kernel(*parts)
    return [out.detach(), *torch.autograd.grad(out, parts, grad)]


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_attention(q, k, v, "products")


def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_attention(q, k, v, "math")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 queries and, at 10 positions, of 4 heads: neither divides what there is."""
    monkeypatch.setattr(attention, "TILE_QUERIES", 4)
    monkeypatch.setattr(attention, "TILE_BYTES", 4 * 4 * 10 * 8)


@pytest.mark.parametrize("kernel", ["math", "flash", "products"])
def test_kernels_agree(kernel: Attention):
    *parts, _ = random_parts(9, dtype=torch.float32)
    auto, other = (causal_attention(*parts, choice) for choice in ("auto", kernel))
    torch.testing.assert_close(auto, other, rtol=1e-5, atol=1e-6)  # fp32 rounding


def test_an_unknown_kernel_is_refused():
    with pytest.raises(
        UserError, match=r"^no attention is called 'fast'; expected one of auto, flash, cudnn, "
    ):
        # past the type check that runs in tests only
        causal_attention.__wrapped__(*torch.zeros(3, 1, 1, 1, 1).unbind(), "fast")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("T", [1, 3, 4, 10, 12])
def test_products_are_exact_in_tiles_of_any_size(T: int):
    parts = random_parts(T)
    expected = with_gradients(exactly, *parts)
    for got, exact in zip(with_gradients(by_products, *parts), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)  # fp64 rounding


@pytest.mark.parametrize(("deviation", "error"), [(1.0, 0.006), (2.0, 0.01)])
def test_products_in_bfloat16_are_off_by_its_rounding(deviation: float, error: float):
    """Scores of deviation 1 and 2: what a number of 8 bits loses, and twice that."""
    parts = random_parts(300, D=64, dtype=torch.bfloat16, deviation=deviation)
    expected = with_gradients(exactly, *(part.double() for part in parts))
    for got, exact in zip(with_gradients(by_products, *parts), expected, strict=True):
        assert (got.double() - exact).norm() < error * exact.norm()


@pytest.mark.usefixtures("small_tiles")
def test_products_are_an_operator_as_pytorch_wants_one():
    q, k, v, grad = (part.flatten(0, 1) for part in random_parts(10))
    torch.library.opcheck(attention.ATTENTION, (q, k, v))
    torch.library.opcheck(attention.GRADIENTS, (grad, q, k, v))


@pytest.mark.usefixtures("small_tiles")
def test_products_under_torch_func():
    """Per-example gradients, by `vmap` over `grad`, with keys that all examples share."""
    q, k, v, weight = random_parts(10)

    def gradients(kernel: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def loss(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
            return (kernel(q[None], k[None], v[None])[0] * weight).sum()

        by_example = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, 0, 0))
        return by_example(q, k[0], v, weight)

    for got, expected in zip(gradients(by_products), gradients(exactly), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)  # fp64 rounding


def test_products_refuse_a_second_derivative():
    q, k, v, grad = random_parts(10)

    def first(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: (by_products(q, k, v) * grad).sum())(q).square().sum()

    with pytest.raises(
        NotImplementedError, match=r'^attention by products has no second derivative; use attention="math"$'
    ):
        torch.func.grad(first)(q)


@pytest.mark.usefixtures("small_tiles")
def test_products_in_a_graph():
    parts = random_parts(10)
    torch._dynamo.reset()
    compiled = torch.compile(by_products, backend="aot_eager", fullgraph=True)
    for got, expected in zip(
        with_gradients(compiled, *parts), with_gradients(by_products, *parts), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("faster", "chosen", "precision", "expected"),
    [
        (True, "auto", torch.bfloat16, "products"),
        (True, "auto", torch.float32, "auto"),
        (True, "flash", torch.bfloat16, "flash"),
        (False, "auto", torch.bfloat16, "auto"),
    ],
)
def test_a_graph_takes_products_where_they_are_faster(
    faster: bool,
    chosen: Attention,
    precision: torch.dtype,
    expected: Attention,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attention, "PRODUCTS_ARE_FASTER", faster)
    assert in_a_graph(chosen, torch.zeros(1, dtype=precision)) == expected
