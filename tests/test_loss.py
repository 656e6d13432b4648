"""The loss in chunks is the loss, and so are its gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nanogpt.errors import UserError
from nanogpt.loss import HeadLoss, chunk_tokens_of, head_loss, head_loss_and_grads, next_token_loss

V, PADDED, B, T, C = 65, 128, 3, 7, 16
TOKENS = B * T  # 21, which 4 and 8 do not divide
CHUNKS = [1, 4, 7, 8, TOKENS, 1024]
ONE = torch.tensor(1.0)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def head() -> Tensor:
    """A padded head with large values in the padding, which must not count."""
    return torch.cat(
        [torch.randn(V, C, generator=torch.Generator().manual_seed(1)), torch.full((PADDED - V, C), 9.0)]
    )


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


def plain_loss(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = features @ head[:V].T
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


def close(got: Tensor, expected: Tensor) -> None:
    # fp32 sums of 21 tokens in another order: a few units in the last place
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_next_token_loss_does_not_depend_on_the_chunk(
    features: Tensor, head: Tensor, targets: Tensor, chunk_tokens
):
    logits = features @ head[:V].T
    close(next_token_loss(logits, targets, chunk_tokens=chunk_tokens), plain_loss(features, head, targets))


def test_next_token_loss_of_bf16_logits_is_computed_in_fp32(features: Tensor, head: Tensor, targets: Tensor):
    logits = (features @ head[:V].T).bfloat16()
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))


def test_next_token_loss_of_each_token_is_mapped(features: Tensor, head: Tensor, targets: Tensor):
    logits = features @ head[:V].T
    losses = torch.func.vmap(torch.func.vmap(next_token_loss))(logits, targets)
    close(losses, F.cross_entropy(logits.mT, targets, reduction="none"))


def test_next_token_loss_leaves_out_targets_of_minus_100(features: Tensor, head: Tensor, targets: Tensor):
    targets[1:] = -100  # with chunks of 4 tokens some chunks hold nothing else
    loss = next_token_loss(features @ head[:V].T, targets, chunk_tokens=4)
    close(loss, plain_loss(features[:1], head, targets[:1]))


def test_next_token_loss_refuses_targets_of_another_shape(features: Tensor, head: Tensor, targets: Tensor):
    with pytest.raises(UserError) as caught:
        # past the type check that runs in tests only
        next_token_loss.__wrapped__(features @ head[:V].T, targets.T)
    assert str(caught.value) == (
        "the targets have shape [7, 3], expected [3, 7] for logits of shape [3, 7, 65]; "
        "give each row of logits its target"
    )


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    loss = next_token_loss(torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.int64))
    close(loss, torch.tensor(float(V)).log())


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_head_loss_is_the_sum_over_all_tokens(
    features: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int
):
    loss = head_loss(features, head, targets, vocab_size=V, chunk_tokens=chunk_tokens)
    close(loss, plain_loss(features, head, targets) * TOKENS)


def test_head_loss_of_a_bf16_head_is_computed_in_fp32(features: Tensor, head: Tensor, targets: Tensor):
    features, head = features.bfloat16(), head.bfloat16()
    loss = head_loss(features, head, targets, vocab_size=V, chunk_tokens=4)
    assert loss.dtype == torch.float32
    logits = F.linear(features, head[:V]).float()
    close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


def test_head_loss_leaves_out_targets_of_minus_100(features: Tensor, head: Tensor, targets: Tensor):
    cut = targets.clone()
    cut[1:] = -100  # with chunks of 4 tokens some chunks hold nothing else
    loss = head_loss(features, head, cut, vocab_size=V, chunk_tokens=4)
    close(loss, plain_loss(features[:1], head, targets[:1]) * T)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_head_loss_and_grads_equals_autograd_of_the_plain_loss(
    features: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int
):
    loss, features_grad, head_grad = head_loss_and_grads(
        features, head, targets, vocab_size=V, chunk_tokens=chunk_tokens
    )
    features.requires_grad_(), head.requires_grad_()
    expected = plain_loss(features, head, targets)
    expected_features_grad, expected_head_grad = torch.autograd.grad(expected, (features, head))
    close(loss, expected.detach())
    close(features_grad, expected_features_grad)
    close(head_grad, expected_head_grad)


def test_padded_rows_of_the_head_get_no_gradient(features: Tensor, head: Tensor, targets: Tensor):
    _, _, head_grad = head_loss_and_grads(features, head, targets, vocab_size=V)
    assert head_grad[V:].count_nonzero() == 0


def test_a_target_in_the_padding_is_out_of_bounds(features: Tensor, head: Tensor, targets: Tensor):
    targets[0, 0] = V  # a column of the padded head that no word has
    with pytest.raises(RuntimeError, match=f"index {V} is out of bounds"):
        head_loss_and_grads(features, head, targets, vocab_size=V)


def test_a_cpu_writes_no_bias_to_every_row_of_the_logits(features: Tensor, head: Tensor, targets: Tensor):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        head_loss_and_grads(features, head, targets, vocab_size=V)
    names = [event.name for event in profiler.events()]
    assert names.count("aten::mm") == 3  # logits, and the gradients by features and by head
    assert "aten::addmm" not in names


def test_scale_multiplies_the_gradients_and_not_the_loss(features: Tensor, head: Tensor, targets: Tensor):
    loss, features_grad, head_grad = head_loss_and_grads(features, head, targets, vocab_size=V)
    scaled = head_loss_and_grads(features, head, targets, vocab_size=V, scale=torch.tensor(1024.0))
    close(scaled[0], loss)
    close(scaled[1], features_grad * 1024)
    close(scaled[2], head_grad * 1024)


@pytest.mark.parametrize("rows_at_a_time", [50, PADDED, 4096])  # 50 does not divide the head's 128
def test_gradients_of_a_bf16_head_add_up_in_fp32(
    features: Tensor,
    head: Tensor,
    targets: Tensor,
    rows_at_a_time: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("nanogpt.loss.PRODUCT_ROWS", rows_at_a_time)
    _, features_grad, head_grad = head_loss_and_grads(
        features.bfloat16(), head.bfloat16(), targets, vocab_size=V, chunk_tokens=1
    )
    assert (features_grad.dtype, head_grad.dtype) == (torch.bfloat16, torch.float32)
    _, _, at_once = head_loss_and_grads(features, head, targets, vocab_size=V)
    # each of 21 chunks rounds to 8 bits; a bf16 sum of them would be off by several per cent
    assert (head_grad - at_once).norm() < 0.01 * at_once.norm()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_head_loss_passes_on_the_cotangent_and_copies_no_gradient_for_1(
    features: Tensor, head: Tensor, targets: Tensor, factor
):
    features, embedding = features.requires_grad_(), head[:V].clone().requires_grad_()
    settings = dict(vocab_size=V, chunk_tokens=8, chunk=None)
    value, _, head_grad = HeadLoss.apply(features, embedding, targets, torch.tensor(2.0), head, settings)
    grads = torch.autograd.grad(factor * value, [features, embedding])

    expected = torch.autograd.grad(
        factor * 2 * plain_loss(features, embedding, targets), [features, embedding]
    )
    close(value, 2 * plain_loss(features, embedding, targets))
    close(grads[0], expected[0])
    close(grads[1], expected[1])
    assert (grads[1].data_ptr() == head_grad.data_ptr()) == (factor == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_under_vmap_passes_on_each_cotangent(
    features: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype
):
    settings = dict(vocab_size=V, chunk_tokens=8, chunk=None)

    def grads(factor: Tensor) -> tuple[Tensor, Tensor]:
        def loss(features: Tensor, embedding: Tensor) -> Tensor:
            return factor * HeadLoss.apply(features, embedding, targets, ONE, head.to(dtype), settings)[0]

        return torch.func.grad(loss, argnums=(0, 1))(features.to(dtype), head[:V])

    factors = torch.tensor([1.0, 3.0])
    for got, once in zip(torch.func.vmap(grads)(factors), grads(ONE), strict=True):
        assert got.dtype == once.dtype
        for row, factor in zip(got, factors, strict=True):
            close(row, once * factor)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("by", ["torch.func", "autograd"])
def test_head_loss_refuses_a_second_derivative(
    features: Tensor, head: Tensor, targets: Tensor, by: str, beside: bool
):
    """By itself, and beside the loss's own first derivative."""

    def loss(features: Tensor) -> Tensor:
        settings = dict(vocab_size=V, chunk_tokens=8, chunk=None)
        return HeadLoss.apply(features, head[:V], targets, ONE, head, settings)[0]

    def size_of_gradient(features: Tensor) -> Tensor:
        if by == "torch.func":
            grad, value = torch.func.grad_and_value(loss)(features)
        else:
            value = loss(features)
            (grad,) = torch.autograd.grad(value, features, create_graph=True)
        return grad.square().sum() + beside * value

    derivative = torch.func.grad(size_of_gradient) if by == "torch.func" else taped_grad(size_of_gradient)
    advice = r'differentiate next_token_loss\(apply\(..., attention="math"\), ...\) instead$'
    with pytest.raises(NotImplementedError, match=rf"^this loss has no second derivative; {advice}"):
        derivative(features)


def taped_grad(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def grad(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    return grad


@pytest.mark.parametrize(
    ("device", "precision", "cpu", "tokens"),
    [
        ("cpu", "float32", {"amx_bf16": True}, 1024),
        ("cpu", "bfloat16", {"amx_bf16": True}, 2048),
        ("cpu", "bfloat16", {"amx_bf16": False}, 1024),
        ("cpu", "bfloat16", {}, 1024),
        ("cuda", "bfloat16", {}, 8192),
    ],
)
def test_a_chunk_has_more_tokens_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, device, precision, cpu, tokens
):
    monkeypatch.setattr("nanogpt.loss.CPU", cpu)
    assert chunk_tokens_of(device, precision) == tokens
