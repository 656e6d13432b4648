"""The network is GPT-2: it equals Hugging Face's, sees no future, and its dropout follows from a key."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import hugging_face, hugging_face_grads, hugging_face_loss
from torch import Tensor

from nanogpt import model, tree
from nanogpt.attention import causal_attention
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.loss import next_token_loss
from nanogpt.model import (
    GPT2Config,
    Params,
    apply,
    apply_trunk,
    block_key,
    causal_attention_with_dropout,
    dropout,
    fold_in,
    gelu,
    init,
    keep_mask,
    padded_head,
)
from nanogpt.sample import generate
from nanogpt.train import make_eval_step, make_value_and_grad

SMALL = GPT2Config(vocab_size=130, block_size=16, n_layer=3, n_head=4, n_embd=32)
ONE = torch.ones(())


def key_of(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64)


def random_params(config: GPT2Config, *, spread: float) -> Params:
    """Initial weights moved by noise, so that biases, gains and all else count."""
    generator = torch.Generator().manual_seed(0)
    params = init(config, generator)
    return tree.map(lambda leaf: leaf + spread * torch.randn(leaf.shape, generator=generator), params)


def random_text(config: GPT2Config, *, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(config.vocab_size, (rows, columns + 1), generator=torch.Generator().manual_seed(1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def relative_differences(got: Params, expected: Params) -> dict[str, float]:
    """Norm of the difference over norm, by name."""
    assert tree.diff(got, expected) == []
    return {name: float((got[name] - leaf).norm() / leaf.norm()) for name, leaf in expected.items()}


# Equal to PyTorch's operators


def test_gelu_in_a_graph_is_gelu():
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])])
    in_graph = torch.compile(gelu, fullgraph=True, backend="eager")
    got, expected = (taken(f, x) for f in (in_graph, gelu))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)  # 1 + tanh cancels where x is negative
    assert not got[0].equal(expected[0])  # it is the other formula


def taken(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the function and of its derivative."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


# Equal to Hugging Face's GPT2LMHeadModel


@pytest.mark.parametrize("vocab_size", [65, 128, 130])
def test_logits_equal_those_of_hugging_face(vocab_size: int):
    config = dataclasses.replace(SMALL, vocab_size=vocab_size)
    params, (inputs, _) = random_params(config, spread=0.1), random_text(config, rows=3, columns=16)
    logits = apply(params, inputs, config)
    expected = hugging_face(config, params)(inputs).logits.detach()
    assert expected.std() > 0.3  # logits of weight, so that the bound below says something
    assert (logits - expected).abs().max() < 1e-5  # "within 1e-4" is the promise; rounding is below 2e-6


@pytest.mark.parametrize("vocab_size", [65, 128, 130])
@pytest.mark.parametrize("by", ["torch.func.grad", "make_value_and_grad"])
def test_every_gradient_equals_that_of_hugging_face(vocab_size: int, by: str):
    config = dataclasses.replace(SMALL, vocab_size=vocab_size)
    params, (inputs, targets) = random_params(config, spread=0.1), random_text(config, rows=3, columns=16)
    if by == "torch.func.grad":
        grads, loss = torch.func.grad_and_value(lambda p: next_token_loss(apply(p, inputs, config), targets))(
            params
        )
    else:
        value_and_grad = make_value_and_grad(config, precision="float32", loss_chunk_tokens=20)
        loss, grads = value_and_grad(params, Batch(inputs[None], targets[None]), key_of(0), ONE)
    model = hugging_face(config, params)
    expected = hugging_face_loss(model, inputs, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)  # fp32 rounding
    # "1e-4 relative" is the promise; rounding is below 2e-6
    assert max(relative_differences(grads, hugging_face_grads(model)).values()) < 1e-5


def test_the_124m_model_equals_that_of_hugging_face_in_logits_and_gradients():
    config = GPT2Config()
    params, (inputs, targets) = random_params(config, spread=0.01), random_text(config, rows=1, columns=8)
    model = hugging_face(config, params)
    logits = model(inputs, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():
        assert (apply(params, inputs, config) - logits).abs().max() < 1e-4
    value_and_grad = make_value_and_grad(config, precision="float32")
    _, grads = value_and_grad(params, Batch(inputs[None], targets[None]), key_of(0), ONE)
    assert max(relative_differences(grads, hugging_face_grads(model)).values()) < 1e-4


def test_names_and_shapes_are_those_of_hugging_face():
    params = init(SMALL, torch.Generator())
    model = hugging_face(SMALL, params)
    theirs = model.state_dict().keys() - dict(model.named_buffers()).keys() - {"lm_head.weight"}
    assert {f"transformer.{name}" for name in params} == theirs
    assert all(leaf.shape == params[name].shape for name, leaf in hugging_face_params(model).items())


def hugging_face_params(model: torch.nn.Module) -> Params:
    return {name.removeprefix("transformer."): leaf for name, leaf in model.named_parameters()}


# Derivatives of derivatives


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of jvp
@pytest.mark.parametrize("by", ["grad of grad", "jvp of grad"])
def test_a_hessian_times_a_vector_is_the_slope_of_the_gradient(by: str):
    params, (inputs, targets) = random_params(SMALL, spread=0.1), random_text(SMALL, rows=2, columns=16)
    params = tree.map(torch.Tensor.double, params)
    direction = {name: leaf.flip(0) for name, leaf in params.items()}

    def dot(a: Params, b: Params) -> Tensor:
        return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()

    grad = torch.func.grad(
        lambda params: next_token_loss(apply(params, inputs, SMALL, attention="math"), targets)
    )
    if by == "grad of grad":
        product = torch.func.grad(lambda params: dot(grad(params), direction))(params)
    else:
        product = torch.func.jvp(grad, (params,), (direction,))[1]
    ahead = grad(tree.map(lambda leaf, step: leaf + 1e-4 * step, params, direction))
    behind = grad(tree.map(lambda leaf, step: leaf - 1e-4 * step, params, direction))
    slope = tree.map(lambda a, b: (a - b) / 2e-4, ahead, behind)
    # The loss is fp32: its gradients' rounding is divided by the distance.
    assert max(relative_differences(product, slope).values()) < 1e-2


def test_the_gradient_of_a_step_refuses_to_be_differentiated():
    params, (inputs, targets) = random_params(SMALL, spread=0.1), random_text(SMALL, rows=2, columns=16)
    value_and_grad = make_value_and_grad(SMALL, precision="float32", attention="math")

    def size_of_gradient(params: Params) -> Tensor:
        _, grads = value_and_grad(params, Batch(inputs[None], targets[None]), key_of(0), ONE)
        return tree.global_norm(grads)

    with pytest.raises(NotImplementedError, match=r"^this loss has no second derivative"):
        torch.func.grad(size_of_gradient)(params)


# Padding


@pytest.mark.parametrize("vocab_size", [1, 65, 128, 129])
def test_padding_does_not_show_in_logits_or_loss(vocab_size: int):
    config = dataclasses.replace(SMALL, vocab_size=vocab_size)
    assert config.padded_vocab_size % 128 == 0
    assert 0 <= config.padded_vocab_size - vocab_size < 128
    params, (inputs, targets) = random_params(config, spread=0.1), random_text(config, rows=2, columns=16)
    logits = apply(params, inputs, config)
    assert logits.shape == (2, 16, vocab_size)
    value_and_grad = make_value_and_grad(config, precision="float32")
    loss, grads = value_and_grad(params, Batch(inputs[None], targets[None]), key_of(0), ONE)
    plain = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-7)  # fp32 rounding
    assert grads["wte.weight"].shape == (vocab_size, 32)


def test_the_head_is_multiplied_with_rows_of_zeros_up_to_a_multiple_of_128():
    params = init(SMALL, torch.Generator())
    head = padded_head(params, SMALL)
    assert head.shape == (256, 32)
    assert head[:130].equal(params["wte.weight"])
    assert head[130:].count_nonzero() == 0


# No position sees a later one


def test_later_tokens_do_not_change_earlier_logits():
    params, (inputs, _) = random_params(SMALL, spread=0.1), random_text(SMALL, rows=1, columns=16)
    logits = apply(params, inputs, SMALL)
    changed = inputs.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % SMALL.vocab_size
    after = apply(params, changed, SMALL)
    assert after[:, :9].equal(logits[:, :9])
    assert (after[:, 9:] - logits[:, 9:]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_gradients_reach_a_position_from_itself_and_later_ones_only(attention: str):
    params, (inputs, _) = random_params(SMALL, spread=0.1), random_text(SMALL, rows=1, columns=16)

    def logits_of(positions: Tensor) -> Tensor:
        """Position t alone reads row t of wpe.weight, so its gradient says who sees position t."""
        return (
            apply(params | {"wpe.weight": positions}, inputs, SMALL, attention=attention)[0].square().sum(-1)
        )

    rows = [torch.func.grad(lambda p, t=t: logits_of(p)[t])(params["wpe.weight"]) for t in range(16)]
    reach = torch.stack(rows).abs().sum(-1)  # [logits at t, input at s]
    assert reach.triu(1).count_nonzero() == 0
    assert (reach > 0).equal(torch.ones(16, 16).tril() > 0)


# Initialisation


def test_initial_weights_have_the_published_deviations():
    config = GPT2Config(vocab_size=500, block_size=128, n_layer=8, n_head=4, n_embd=64)
    for name, leaf in init(config, torch.Generator().manual_seed(0)).items():
        if name.endswith("bias"):
            assert leaf.equal(torch.zeros_like(leaf)), name
        elif "ln_" in name:
            assert leaf.equal(torch.ones_like(leaf)), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            # five standard errors of a mean and of a deviation
            assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.numel()), name
            assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.numel()), name
            assert leaf.dtype == torch.float32


def test_initial_weights_follow_from_the_generator():
    first, again, other = (init(SMALL, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(leaf.equal(again[name]) for name, leaf in first.items())
    assert not first["wte.weight"].equal(other["wte.weight"])


def test_a_fresh_model_is_as_unsure_as_its_vocabulary_is_large():
    params, (inputs, targets) = (
        init(SMALL, torch.Generator().manual_seed(0)),
        random_text(SMALL, rows=8, columns=16),
    )
    loss = next_token_loss(apply(params, inputs, SMALL), targets)
    assert abs(float(loss) - math.log(130)) < 0.05  # weights of deviation 0.02 give logits of deviation 0.1


# Attention


@pytest.mark.parametrize("attention", ["math", "flash", "products"])
def test_the_network_is_the_same_with_each_attention(attention: str):
    params, (inputs, _) = random_params(SMALL, spread=0.1), random_text(SMALL, rows=2, columns=16)
    auto, other = (apply(params, inputs, SMALL, attention=choice) for choice in ("auto", attention))
    torch.testing.assert_close(auto, other, rtol=1e-5, atol=1e-5)  # fp32 rounding through three blocks


def test_a_linear_map_in_a_graph_adds_its_bias_in_fp32():
    """On a CPU in half precision the product and the sum are rounded, the bias and its gradient are not."""
    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator) for shape in [(2, 3, 8), (8, 5), (5,), (2, 3, 5)]
    )
    x, weight, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
    torch._dynamo.reset()
    linear = torch.compile(model.Linear(8, 5), backend="aot_eager", fullgraph=True)
    leaves = {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}
    got = torch.func.functional_call(linear, {f"_orig_mod.{name}": leaf for name, leaf in leaves.items()}, x)
    assert torch.equal(got, ((x @ weight).float() + bias).to(dtype))
    bias_grad = torch.autograd.grad(got, bias, grad)[0]
    torch.testing.assert_close(bias_grad, grad.float().sum((0, 1)), rtol=1e-6, atol=1e-6)  # fp32 rounding


def test_attention_written_out_for_dropout_equals_the_fused_one():
    q_BHTD, k_BHTD, v_BHTD = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    written_out = causal_attention_with_dropout(q_BHTD, k_BHTD, v_BHTD, 0.0, key_of(3), 0)
    fused = causal_attention(q_BHTD, k_BHTD, v_BHTD, "auto")
    torch.testing.assert_close(written_out, fused, rtol=1e-5, atol=1e-6)  # fp32 rounding


# Dropout

DROPPING = dataclasses.replace(SMALL, dropout=0.25)


def test_the_same_key_drops_the_same_features():
    params, (inputs, _) = random_params(DROPPING, spread=0.1), random_text(DROPPING, rows=2, columns=16)
    first, again, other = (
        apply(params, inputs, DROPPING, dropout_key=key_of(number)) for number in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_nothing_is_dropped_without_a_key():
    params, (inputs, _) = random_params(DROPPING, spread=0.1), random_text(DROPPING, rows=2, columns=16)
    assert apply(params, inputs, DROPPING).equal(apply(params, inputs, SMALL))


def test_without_dropout_the_key_does_not_count():
    params, (inputs, _) = random_params(SMALL, spread=0.1), random_text(SMALL, rows=2, columns=16)
    assert apply(params, inputs, SMALL, dropout_key=key_of(1)).equal(apply(params, inputs, SMALL))


def test_features_are_dropped_where_hugging_face_drops_them(monkeypatch: pytest.MonkeyPatch):
    """Its masks are replaced by ours, in the order in which its network comes to them, each of its own."""
    key, layers = key_of(1), range(DROPPING.n_layer)
    places = [(key, 0), *((block_key(key, layer), site) for layer in layers for site in range(3))]
    left = iter(places)
    monkeypatch.setattr(F, "dropout", lambda x, *_, **__: dropout(x, DROPPING.dropout, *next(left)))
    params, (inputs, _) = random_params(DROPPING, spread=0.1), random_text(DROPPING, rows=2, columns=16)
    model = hugging_face(DROPPING, params)
    model.set_attn_implementation("eager")  # the probabilities exist, and are dropped by F.dropout
    expected = model(inputs).logits.detach()
    assert next(left, None) is None
    assert len({int(fold_in(*place)) for place in places}) == len(places)
    got = apply(params, inputs, DROPPING, dropout_key=key)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # fp32 rounding through three blocks


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
def test_the_expected_share_is_dropped_and_the_rest_makes_up_for_it(rate: float):
    kept = dropout(torch.ones(1000, 1000), rate, key_of(7), 0)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    # five standard errors of a share of a million
    assert abs(float((kept == 0).float().mean()) - rate) < 5 * math.sqrt(rate * (1 - rate) / 1e6)


def test_a_mask_has_no_stripes():
    mask = keep_mask(torch.empty(1024, 1024), 0.5, key_of(7)).float()
    for dim in (0, 1):
        # the furthest of 1,024 means of 1,024 fair coins lies about 3.3 deviations out
        assert (mask.mean(dim) - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(1024)


@pytest.mark.parametrize("data", [(0, 1), (1, 2), (2, 3), (0, 2**20)])
def test_masks_of_two_folded_keys_agree_by_chance_only(data: tuple[int, int]):
    one, other = (keep_mask(torch.empty(10**6), 0.5, fold_in(key_of(0), number)) for number in data)
    assert abs(float((one == other).float().mean()) - 0.5) < 5 * 0.5 / 1000  # five standard errors


def test_the_mask_of_another_key_is_not_the_same_mask_in_another_place():
    position = torch.arange(2**16)
    mask, other = (keep_mask(position, 0.5, key_of(number)) for number in (0, 1))
    for moved in (
        position ^ 1,
        position + 1,
        position - 1,
    ):  # what a key that meets the position too early would do
        share = float((mask[moved % 2**16] == other).float().mean())
        assert abs(share - 0.5) < 5 * 0.5 / 2**8  # five standard errors


def test_keys_of_seeds_steps_and_microsteps_are_all_different():
    ten = range(10)
    steps = [fold_in(key_of(seed), key_of(step)) for seed in ten for step in ten]
    keys = [int(fold_in(step, microstep)) for step in steps for microstep in ten]
    assert len(set(keys)) == 1000


def test_a_compiled_mask_equals_the_eager_one():
    compiled = torch.compile(keep_mask, fullgraph=True)
    x = torch.empty(64, 100)
    assert compiled(x, 0.3, key_of(2**31 - 1)).equal(keep_mask(x, 0.3, key_of(2**31 - 1)))


# Mistakes


@pytest.mark.parametrize("field", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_a_size_below_one_is_refused(field: str):
    with pytest.raises(UserError) as caught:
        GPT2Config(**{field: 0})
    flag = field.replace("_", "-")
    assert str(caught.value) == f"model.{field} is 0, expected at least 1; set --model.{flag}"


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(UserError) as caught:
        GPT2Config(n_head=5, n_embd=64)
    assert str(caught.value) == (
        "n_embd 64 does not divide into 5 heads; set --model.n-embd to a multiple of --model.n-head"
    )


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(rate: float):
    with pytest.raises(UserError) as caught:
        GPT2Config(dropout=rate)
    assert str(caught.value) == f"dropout is {rate}, expected at least 0 and below 1; set --model.dropout"


@pytest.mark.parametrize("name", model.PUBLISHED_SIZES)
def test_published_sizes_have_heads_of_64_features(name: str):
    config = GPT2Config.named(name)
    assert config.n_embd == 64 * config.n_head


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError) as caught:
        GPT2Config.named("gpt3")
    assert str(caught.value) == (
        "no GPT-2 is called 'gpt3'; expected one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    )


def test_a_sequence_beyond_the_positions_is_refused():
    params = init(SMALL, torch.Generator())
    with pytest.raises(UserError) as caught:
        apply(params, torch.zeros(1, 17, dtype=torch.int64), SMALL)
    assert str(caught.value) == (
        "a sequence has 17 tokens, the model 16 positions; cut the sequence or set --model.block-size"
    )


@pytest.mark.parametrize("shape", [(16,), (1, 2, 16)])
def test_tokens_of_another_rank_are_refused(shape: tuple[int, ...]):
    params, tokens = init(SMALL, torch.Generator()), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        # past the type check that runs in tests only
        apply_trunk.__wrapped__(params, tokens, SMALL)
    assert str(caught.value) == (
        f"the tokens of a pass have shape {list(shape)}, expected [B, T] (a Batch has [A, B, T], A passes); "
        "add or index the dimension that differs, as in tokens[None]"
    )


def applied(params: Params) -> None:
    apply(params, torch.zeros(1, 3, dtype=torch.int64), SMALL)


def sampled(params: Params) -> None:
    generate(params, SMALL, torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=1)


def differentiated(params: Params) -> None:
    tokens = torch.zeros(1, 1, 3, dtype=torch.int64)
    make_value_and_grad(SMALL)(params, Batch(tokens, tokens), key_of(0), ONE)


def evaluated(params: Params) -> None:
    tokens = torch.zeros(1, 1, 3, dtype=torch.int64)
    make_eval_step(SMALL, compile=False)(params, Batch(tokens, tokens))


@pytest.mark.parametrize("use", [applied, sampled, differentiated, evaluated])
def test_a_missing_leaf_is_refused(use: Callable[[Params], None]):
    """The skeleton's own weight would be multiplied, without an error, as whatever memory holds."""
    params = init(SMALL, torch.Generator())
    del params["h.1.mlp.c_fc.weight"]
    with pytest.raises(UserError) as caught:
        use(params)
    assert str(caught.value) == (
        "h.1.mlp.c_fc.weight is not among the parameters (1 of 40 leaves are missing); "
        "expected the names that init(config, generator) gives them"
    )
