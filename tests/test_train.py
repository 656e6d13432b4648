"""A step is the usual training step as a pure function: equal to the usual one, and compiled once."""

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from reference import hugging_face, hugging_face_loss
from torch import Tensor

from nanogpt import model, optim, perf, tree
from nanogpt.attention import Attention
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config, fold_in
from nanogpt.optim import (
    Transform,
    adamw,
    chain,
    clip_by_global_norm,
    dynamic_loss_scale,
    scale_by_learning_rate,
    warmup_cosine,
)
from nanogpt.sample import generate
from nanogpt.train import (
    DTYPES,
    EvalStep,
    Metrics,
    Precision,
    TrainState,
    TrainStep,
    init_state,
    make_eval_step,
    make_loss,
    make_train_step,
    make_value_and_grad,
    taped_grad_and_value,
)

TINY = GPT2Config(vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=16)
DROPPING = dataclasses.replace(TINY, dropout=0.2)
SCHEDULE = warmup_cosine(1e-2, final=1e-3, warmup_steps=5, total_steps=50)
OPTIMIZER = chain(clip_by_global_norm(1.0), adamw(SCHEDULE, b1=0.9, b2=0.95, weight_decay=0.1))


def start(optimizer: Transform = OPTIMIZER, config: GPT2Config = TINY) -> TrainState:
    return init_state(config, optimizer, torch.Generator().manual_seed(0))


def batch_of(step: int, *, A: int = 1, B: int = 4) -> Batch:
    """Text that can be learned: a walk over the vocabulary with a step of 1 or 2."""
    generator = torch.Generator().manual_seed(step)
    strides = torch.randint(1, 3, (A, B, TINY.block_size + 1), generator=generator)
    text = strides.cumsum(-1) % TINY.vocab_size
    return Batch(text[..., :-1].contiguous(), text[..., 1:].contiguous())


def copy_of(state: TrainState) -> TrainState:
    return tree.map(torch.clone, state)


def same_bits(one: Any, other: Any) -> bool:
    return all(a.equal(b) for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True))


def run_steps(
    train_step: TrainStep, state: TrainState, batches: list[Batch]
) -> tuple[TrainState, list[Metrics]]:
    all_metrics = []
    for batch in batches:
        state, metrics = train_step(state, batch)
        all_metrics.append(tree.map(torch.clone, metrics))
    return state, all_metrics


# Equal to the usual training step


def usual_losses(batches: list[Batch]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a module, torch.optim.AdamW in two groups, and clip_grad_norm_."""
    model = hugging_face(TINY, start().params)
    leaves = list(model.parameters())
    groups = [
        {"params": [leaf for leaf in leaves if leaf.ndim >= 2], "weight_decay": 0.1},
        {"params": [leaf for leaf in leaves if leaf.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, losses, norms = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8), [], []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = hugging_face_loss(model, batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = float(SCHEDULE(torch.tensor(step)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


def test_fifty_steps_follow_a_module_with_torch_adamw_and_clipping():
    batches = [batch_of(step, A=1 + step % 3) for step in range(50)]
    train_step = make_train_step(TINY, OPTIMIZER, precision="float32", compile=False)
    _, metrics = run_steps(train_step, start(), batches)
    losses, norms = usual_losses(batches)
    assert losses[0] - losses[-1] > 1  # it learned something, so the losses below are not those of the start
    assert min(norms) < 1 < max(norms)  # some steps are clipped and some are not
    # "1e-4 relative" is the promise; 50 steps of rounding come to 1e-6
    assert [float(m["loss"]) for m in metrics] == pytest.approx(losses, rel=1e-5)
    assert [float(m["grad_norm"]) for m in metrics] == pytest.approx(norms, rel=1e-4)


def test_four_microsteps_equal_one_of_the_same_tokens():
    value_and_grad = make_value_and_grad(TINY, precision="float32")
    one, key = batch_of(0, A=1, B=8), torch.tensor(0)
    four = Batch(*(part.view(4, 2, TINY.block_size) for part in one))
    (loss, grads), (loss_4, grads_4) = (
        value_and_grad(start().params, b, key, torch.ones(())) for b in (one, four)
    )
    torch.testing.assert_close(loss_4, loss, rtol=1e-6, atol=0)  # sums in another order
    for name, leaf in grads.items():
        assert (grads_4[name] - leaf).norm() < 1e-5 * leaf.norm(), name


# Mapped by vmap


def mapped(precision: Precision, optimizer: Transform = OPTIMIZER, **choices: Any) -> TrainStep:
    """An eager step whose attention has a rule for `vmap`."""
    return make_train_step(TINY, optimizer, precision=precision, attention="math", compile=False, **choices)


# bfloat16 products of many models at once are rounded otherwise than those of one
@pytest.mark.parametrize(("precision", "close"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_a_mapped_step_is_the_step_of_each_state_and_batch(precision: Precision, close: float):
    optimizer = chain(clip_by_global_norm(0.5), scale_by_learning_rate(0.1))
    states = [init_state(TINY, optimizer, torch.Generator().manual_seed(seed)) for seed in range(3)]
    batches, step = [batch_of(seed, A=2) for seed in range(3)], mapped(precision, optimizer)
    together, metrics = torch.func.vmap(step)(*(stack(trees) for trees in (states, batches)))
    alone, each = zip(
        *(step(state, batch) for state, batch in zip(states, batches, strict=True)), strict=True
    )
    torch.testing.assert_close(metrics, stack(each), rtol=close, atol=0)
    for moved, wanted, before in zip(*map(tree.leaves, (together, stack(alone), stack(states))), strict=True):
        assert (moved - wanted).float().norm() <= close * (wanted - before).float().norm()


def test_learning_rates_can_be_mapped_over():
    state, batch = start(), batch_of(0)

    def loss_after_three_steps(rate: Tensor) -> Tensor:
        optimizer = chain(clip_by_global_norm(1.0), adamw(lambda step: rate))
        _, metrics = run_steps(mapped("float32", optimizer), state, [batch] * 3)
        return metrics[-1]["loss"]

    rates = torch.tensor([1e-4, 1e-3, 1e-2])
    losses = torch.func.vmap(loss_after_three_steps)(rates)
    assert losses[0] > losses[1] > losses[2]
    torch.testing.assert_close(losses, torch.stack([loss_after_three_steps(rate) for rate in rates]))


def test_a_learning_rate_has_a_gradient():
    """The loss after an update falls along the rate as fast as finite differences say."""
    state, batch = start(), batch_of(0)

    def loss_after_an_update(rate: Tensor) -> Tensor:
        optimizer = chain(clip_by_global_norm(1.0), adamw(lambda step: rate, weight_decay=0.1))
        _, metrics = run_steps(mapped("float32", optimizer), state, [batch] * 2)
        return metrics[-1]["loss"]

    rate, change = torch.tensor(1e-2), 1e-3
    ahead, behind = (loss_after_an_update(rate + sign * change) for sign in (1, -1))
    slope = (ahead - behind) / (2 * change)
    assert slope < -1  # a number of weight
    # what the third derivative makes of a change of a tenth
    torch.testing.assert_close(torch.func.grad(loss_after_an_update)(rate), slope, rtol=0.02, atol=0)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_a_compiled_step_refuses_to_be_transformed(transform: Any):
    state, batch, train_step = start(), batch_of(0), make_train_step(TINY, OPTIMIZER, precision="float32")

    def loss(factor: Tensor) -> Tensor:
        params = tree.map(lambda leaf: factor * leaf, state.params)
        return train_step(state._replace(params=params), batch)[1]["loss"]

    with pytest.raises(UserError) as caught:
        transform(loss)(torch.ones(() if transform is torch.func.grad else 2))
    assert str(caught.value) == "torch.func cannot transform a compiled step; make it with compile=False"


def stack(trees: Sequence[Any]) -> Any:
    """One tree whose leaves are those of `trees`, one above the other."""
    return tree.map(lambda *leaves: torch.stack(leaves), *trees)


def test_a_step_returns_a_new_state_and_leaves_the_old_one_alone():
    state = start()
    before = copy_of(state)
    new_state, _ = make_train_step(TINY, OPTIMIZER, precision="float32", compile=False)(state, batch_of(0))
    assert same_bits(state, before)
    assert int(new_state.step) == 1
    old = {leaf.data_ptr() for leaf in tree.leaves(state)}
    assert not any(leaf.data_ptr() in old for leaf in tree.leaves(new_state))


def check_donation(optimizer: Transform) -> None:
    """Steps that write over the state have the numbers of steps that leave it alone."""
    states = []
    for donate in (False, True):
        step = make_train_step(TINY, optimizer, precision="float32", compile=False, donate=donate)
        states.append(run_steps(step, start(optimizer), [batch_of(step) for step in range(3)])[0])
    assert same_bits(*states)


@pytest.mark.parametrize("view", [lambda leaf: leaf, Tensor.detach], ids=["itself", "a view"])
def test_an_average_that_starts_as_the_parameters_has_memory_of_its_own(view: Callable[[Tensor], Tensor]):
    def update(updates: Any, average: Any, params: Any) -> Any:
        return tree.map(lambda g: -0.1 * g, updates), tree.map(
            lambda a, p: 0.9 * a + 0.1 * p, average, params
        )

    check_donation(Transform(lambda params: tree.map(view, params), update))


def test_moments_that_start_as_the_same_zeros_have_memory_of_their_own():
    def init(params: Any) -> Any:
        zeros = tree.map(torch.zeros_like, params)
        return zeros, zeros

    def update(updates: Any, moments: Any, params: Any, numbers: Any) -> Any:
        first = tree.map(lambda m, g: 0.9 * m + g, moments[0], updates)
        second = tree.map(lambda v, g: 0.9 * v + g * g, moments[1], updates)
        return tree.map(lambda m, v: -0.01 * m / (v.sqrt() + 1e-3), first, second), (first, second)

    check_donation(optim.elementwise(init, update))


def test_an_optimizer_without_a_state_trains():
    descent = Transform(lambda params: (), lambda g, state, p: (tree.map(lambda g: -0.1 * g, g), state))
    step = make_train_step(TINY, descent, precision="float32", compile=False)
    batches = [batch_of(0)] * 3
    _, metrics = run_steps(step, start(descent), batches)
    assert float(metrics[-1]["loss"]) < float(metrics[0]["loss"])


def test_microsteps_hold_the_sum_and_one_gradient_more():
    """What `memory_plan` counts: a third set of gradients would be alive while the next ones are made."""
    config = GPT2Config(vocab_size=4096, block_size=8, n_layer=1, n_head=1, n_embd=64)
    value_and_grad = make_value_and_grad(config, precision="float32")
    state = start(OPTIMIZER, config)
    peaks = []
    for A in (2, 4):
        tokens = torch.zeros(A, 1, 8, dtype=torch.int64)
        arguments = (state.params, Batch(tokens, tokens), torch.zeros((), dtype=torch.int64), torch.ones(()))
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
            value_and_grad(*arguments)
        events = profiler.profiler.kineto_results.events()  # in its own list frees are missing
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peaks.append(max(itertools.accumulate(change for _, change in changes)))
    size = sum(leaf.nbytes for leaf in state.params.values())
    assert peaks[1] == pytest.approx(peaks[0], abs=0.1 * size)


def test_a_donated_state_holds_the_new_values_in_the_old_memory():
    batches = [batch_of(step) for step in range(3)]
    kept, donated = (
        make_train_step(TINY, OPTIMIZER, precision="float32", compile=False, donate=donate)
        for donate in (False, True)
    )
    expected, _ = run_steps(kept, start(), batches)
    given = start()
    got, _ = run_steps(donated, given, batches)
    assert same_bits(got, expected)
    assert [leaf.data_ptr() for leaf in tree.leaves(got)] == [leaf.data_ptr() for leaf in tree.leaves(given)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_master_parameters_and_moments_stay_fp32(precision: str):
    state, metrics = make_train_step(TINY, OPTIMIZER, precision=precision, compile=False)(
        start(), batch_of(0, A=2)
    )
    assert tree.diff(state, start()) == []
    assert {leaf.dtype for leaf in state.params.values()} == {torch.float32}
    assert {leaf.dtype for leaf in metrics.values()} == {torch.float32}


def test_bfloat16_gradients_are_those_of_float32_up_to_rounding():
    grads = {}
    for precision in ("float32", "bfloat16"):
        value_and_grad = make_value_and_grad(TINY, precision=precision)
        _, grads[precision] = value_and_grad(
            start().params, batch_of(0, B=16), torch.tensor(0), torch.ones(())
        )
    for name, leaf in grads["float32"].items():
        # 8 bits of mantissa round by 0.4 %, a few times on the way
        assert (grads["bfloat16"][name] - leaf).norm() < 0.05 * leaf.norm(), name


# One graph of all of it: before the fixture below, which forbids compilation


# torch.compile instantiates an autograd function to look at it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_an_eager_step_can_be_compiled_into_one_graph(monkeypatch: pytest.MonkeyPatch):
    # the one formula that is another in a graph; all else keeps its bits
    monkeypatch.setattr(model, "gelu", functools.partial(torch.nn.functional.gelu, approximate="tanh"))
    eager = make_train_step(DROPPING, OPTIMIZER, precision="float32", compile=False)
    whole = torch.compile(eager, fullgraph=True, backend="aot_eager")
    batches = [batch_of(step, A=2) for step in range(2)]
    (state, metrics), (expected, expected_metrics) = (run_steps(f, start(), batches) for f in (whole, eager))
    assert same_bits(metrics, expected_metrics)
    assert same_bits(state, expected)


# Dropout


def loss_of(
    *, seed: int = 0, step: int = 0, batch: Batch | None = None, config: GPT2Config = DROPPING
) -> float:
    train_step = make_train_step(config, OPTIMIZER, precision="float32", seed=seed, compile=False)
    state = start()._replace(step=torch.tensor(step))
    return float(train_step(state, batch or batch_of(0))[1]["loss"])


def test_dropout_follows_from_the_seed_and_the_step():
    assert loss_of(seed=1, step=2) == loss_of(seed=1, step=2)
    assert len({loss_of(seed=seed, step=step) for seed in (1, 2, 3) for step in (1, 2, 3)}) == 9


def test_without_dropout_seed_and_step_do_not_count():
    assert loss_of(seed=1, step=2, config=TINY) == loss_of(seed=3, step=4, config=TINY)


def test_microsteps_drop_features_of_their_own():
    once = batch_of(0)
    twice = Batch(*(torch.cat([part, part]) for part in once))
    value_and_grad, key = make_value_and_grad(DROPPING, precision="float32"), torch.tensor(5)

    def loss(batch: Batch) -> float:
        return float(value_and_grad(start().params, batch, key, torch.ones(()))[0])

    # Equal masks in both microsteps would make the mean of two equal losses.
    assert loss(twice) != pytest.approx(loss(once), rel=1e-5)
    assert fold_in(key, 0) != fold_in(key, 1)


# float16


def test_float16_with_loss_scaling_follows_float32():
    scaled = dynamic_loss_scale(OPTIMIZER, initial=2.0**10)
    batches = [batch_of(step, A=2) for step in range(10)]
    half = make_train_step(TINY, scaled, precision="float16", compile=False)
    full = make_train_step(TINY, OPTIMIZER, precision="float32", compile=False)
    _, got = run_steps(half, start(scaled), batches)
    _, expected = run_steps(full, start(), batches)
    for name in ("loss", "grad_norm"):
        # 11 bits of mantissa round by 0.05 %; ten steps at a high rate make that more
        assert [float(m[name]) for m in got] == pytest.approx([float(m[name]) for m in expected], rel=0.02)


def test_a_float16_step_that_overflows_is_skipped_and_halves_the_scale():
    scaled = dynamic_loss_scale(OPTIMIZER, initial=2.0**24)  # gradients are beyond float16's 65,504
    state = start(scaled)
    new_state, metrics = make_train_step(TINY, scaled, precision="float16", compile=False)(state, batch_of(0))
    assert math.isfinite(metrics["loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert same_bits(new_state.params, state.params)
    assert same_bits(new_state.opt_state.inner, state.opt_state.inner)
    assert float(new_state.opt_state.scale) == 2.0**23


def test_a_float16_scale_falls_until_steps_are_taken_again():
    scaled = dynamic_loss_scale(OPTIMIZER, initial=2.0**24)
    state = start(scaled)
    train_step = make_train_step(TINY, scaled, precision="float16", compile=False)
    new_state, metrics = run_steps(train_step, state, [batch_of(0)] * 20)
    assert math.isfinite(metrics[-1]["grad_norm"])
    assert 1 < float(new_state.opt_state.scale) < 2.0**24
    assert not same_bits(new_state.params, state.params)


def test_float16_without_loss_scaling_is_refused():
    train_step = make_train_step(TINY, OPTIMIZER, precision="float16", compile=False)
    with pytest.raises(UserError) as caught:
        train_step(start(), batch_of(0))
    assert str(caught.value) == (
        "float16 gradients underflow without loss scaling; wrap the optimizer in dynamic_loss_scale"
    )


def test_an_unknown_precision_is_refused():
    for make in (make_train_step, make_eval_step):
        with pytest.raises(UserError) as caught:
            # past the type check that runs in tests only
            make.__wrapped__(TINY, *([OPTIMIZER] if make is make_train_step else []), precision="int8")
        assert str(caught.value) == (
            "precision is 'int8', expected one of bfloat16, float16, float32; set --train.precision"
        )


# Evaluation


@pytest.mark.parametrize("make_step", [make_value_and_grad, make_eval_step])
@pytest.mark.parametrize("shape", [(0, 4, 16), (1, 0, 16)])
def test_a_batch_without_tokens_is_refused(make_step: Any, shape: tuple[int, ...]):
    batch = Batch(*[torch.zeros(shape, dtype=torch.int64)] * 2)
    settings = () if make_step is make_eval_step else (torch.tensor(0), torch.tensor(1.0))
    with pytest.raises(UserError) as caught:
        make_step(TINY, precision="float32", compile=False)(start().params, batch, *settings)
    assert str(caught.value) == f"a batch of shape {list(shape)} has no tokens, expected at least one"


@pytest.mark.parametrize("shape", [(1, 16, 4), (2, 4, 16)])
@pytest.mark.parametrize("make_step", [make_value_and_grad, make_eval_step])
def test_targets_of_another_shape_than_the_inputs_are_refused(make_step: Any, shape: tuple[int, ...]):
    batch = batch_of(0)._replace(targets=torch.zeros(shape, dtype=torch.int64))
    settings = () if make_step is make_eval_step else (torch.tensor(0), torch.tensor(1.0))
    with pytest.raises(UserError) as caught:
        make_step(TINY, precision="float32", compile=False)(start().params, batch, *settings)
    assert str(caught.value) == (
        f"the targets of a batch have shape {list(shape)}, its inputs [1, 4, 16], "
        f"expected [A, B, T] for both; give each token its target"
    )


def test_an_eval_step_sums_the_loss_of_the_targets_that_count():
    batch = batch_of(0, A=2)
    batch.targets[1, 2:] = -100
    summed = make_eval_step(DROPPING, precision="float32", compile=False)(start().params, batch)
    model = hugging_face(TINY, start().params)
    logits = model(batch.inputs.flatten(0, 1), use_cache=False).logits.detach()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(summed, expected, rtol=1e-6, atol=0)  # sums in another order


def test_an_eval_step_has_the_gradient_of_its_loss():
    batch, params = batch_of(0), start().params
    eval_step = make_eval_step(TINY, precision="float32", compile=False)
    grads = torch.func.grad(lambda params: eval_step(params, batch) / batch.targets.numel())(params)
    value_and_grad = make_value_and_grad(TINY, precision="float32")
    _, expected = value_and_grad(params, batch, torch.tensor(0), torch.ones(()))
    for name, leaf in expected.items():
        assert (grads[name] - leaf).norm() < 1e-5 * leaf.norm(), name  # sums in another order


def test_a_machine_with_cuda_s_compiler_and_no_gpu_starts_silently():
    # A build for CUDA looks for its compiler and would complain of the GPU; no build may say anything.
    program = "import torch, nanogpt.graph as g; g.as_one_graph(lambda x: x.relu())(torch.ones(20))"
    environment = os.environ | {"CUDA_HOME": "/usr"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("compile", "precision", "attention", "widths"),
    [
        (True, "float32", "auto", perf.SAVED_PER_LAYER),
        (True, "bfloat16", "flash", perf.SAVED_PER_LAYER),
        (True, "bfloat16", "auto", perf.SAVED_PER_LAYER),
        (False, "float32", "auto", perf.SAVED_PER_EAGER_LAYER),
    ],
)
def test_a_block_remembers_what_the_memory_plan_says(
    compile: bool, precision: Precision, attention: Attention, widths: int, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU where "auto" takes products in a graph in bfloat16: they need no sum of the softmax."""
    monkeypatch.setattr("nanogpt.attention.PRODUCTS_ARE_FASTER", True)
    two = dataclasses.replace(TINY, n_layer=2)
    sizes = [remembered(config, precision, attention, compile=compile) for config in (TINY, two)]
    B, T, C, H = 4, TINY.block_size, TINY.n_embd, TINY.n_head
    in_fp32 = 2 * 2 * B * T  # mean and deviation a token of both norms, which the plan leaves out
    if not (compile and precision == "bfloat16" and attention == "auto"):
        in_fp32 += H * B * T
    assert sizes[1] - sizes[0] == widths * B * T * C * DTYPES[precision].itemsize + 4 * in_fp32


def remembered(config: GPT2Config, precision: Precision, attention: Attention, *, compile: bool) -> int:
    """Bytes that the loss keeps for its backward pass, each memory counted once, parameters left out."""
    params = init_state(config, OPTIMIZER, torch.Generator().manual_seed(0)).params
    known = {leaf.untyped_storage().data_ptr() for leaf in params.values()}
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept.setdefault(saved.untyped_storage().data_ptr(), saved)
        return saved

    loss = make_loss(config, precision=precision, attention=attention, loss_chunk_tokens=64, compile=compile)
    inputs, targets = (part[0] for part in batch_of(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        taped_grad_and_value(loss)(params, inputs, targets, torch.tensor(0), torch.tensor(1.0))
    return sum(saved.untyped_storage().nbytes() for place, saved in kept.items() if place not in known)


# Compiled: one compilation for all tests below, with dropout and two microsteps


class Compiled(NamedTuple):
    """Two runs of the same steps with the same compiled functions."""

    states: list[TrainState]
    metrics: list[list[Metrics]]
    train_step: TrainStep
    eval_step: EvalStep
    eval_losses: list[Tensor]
    graphs: int


STEPS = 6


def run_compiled(train_step: TrainStep) -> tuple[TrainState, list[Metrics]]:
    return run_steps(train_step, start(), [batch_of(step, A=2) for step in range(STEPS)])


def greedy(length: int, *, compile: bool) -> Tensor:
    prompt = torch.arange(2 * length).view(2, length) % TINY.vocab_size
    return generate(start().params, TINY, prompt, max_new_tokens=20, temperature=0.0, compile=compile)


def graph_count() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    """After the first steps a compilation raises, here and in every test that is given this."""
    torch._dynamo.reset()
    before = graph_count()
    train_step = make_train_step(DROPPING, OPTIMIZER, precision="float32", donate=True)
    eval_step = make_eval_step(TINY, precision="float32")
    train_step(start(), batch_of(0, A=2))
    eval_step(start().params, batch_of(0))
    greedy(3, compile=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        states, metrics = zip(*(run_compiled(train_step) for _ in range(2)), strict=True)
        losses = [eval_step(state.params, batch_of(step)) for step, state in enumerate((start(), *states))]
        compiled = Compiled(
            list(states), list(metrics), train_step, eval_step, losses, graph_count() - before
        )
        yield compiled


def test_training_takes_three_graphs_evaluation_two_and_sampling_one(compiled: Compiled):
    """A block, a chunk of the head, AdamW of a leaf; the first two once more; one token."""
    assert compiled.graphs == 3 + 2 + 1


def test_compiled_steps_equal_eager_ones(compiled: Compiled):
    train_step = make_train_step(DROPPING, OPTIMIZER, precision="float32", compile=False)
    state, metrics = run_compiled(train_step)
    for got, expected in zip(compiled.metrics[0], metrics, strict=True):
        for name, value in expected.items():
            # six steps of sums in another order
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=0)
    for name, leaf in state.params.items():
        assert (compiled.states[0].params[name] - leaf).norm() < 1e-3 * leaf.norm(), name


def test_the_same_seed_twice_gives_the_same_bits(compiled: Compiled):
    assert same_bits(*compiled.states)
    assert same_bits(*compiled.metrics)


def test_a_step_goes_on_from_a_copied_state_with_the_same_bits(compiled: Compiled):
    """What a compiled run with dropout does after a checkpoint: the masks follow from the step alone."""
    batches = [batch_of(step, A=2) for step in range(STEPS)]
    middle, first = run_steps(compiled.train_step, start(), batches[:3])
    middle = tree.map(torch.clone, middle)
    last, rest = run_steps(compiled.train_step, middle, batches[3:])
    assert same_bits(last, compiled.states[0])
    assert same_bits([*first, *rest], compiled.metrics[0])


def test_compiled_evaluation_equals_the_eager_one(compiled: Compiled):
    eval_step = make_eval_step(TINY, precision="float32", compile=False)
    for step, (state, loss) in enumerate(zip((start(), *compiled.states), compiled.eval_losses, strict=True)):
        torch.testing.assert_close(loss, eval_step(state.params, batch_of(step)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [1, 3, 15, 16, 20])
def test_sampling_is_compiled_once_for_all_lengths_and_equals_the_eager_one(compiled: Compiled, length: int):
    """20 new tokens go through every position and past block_size."""
    assert greedy(length, compile=True).equal(greedy(length, compile=False))


def test_more_microsteps_compile_nothing_new(compiled: Compiled):
    compiled.train_step(start(), batch_of(0, A=3))


def test_a_recompilation_would_have_failed(compiled: Compiled):
    for function, arguments in (
        (compiled.train_step, (start(), batch_of(0, A=2, B=3))),
        (compiled.eval_step, (start().params, batch_of(0, B=3))),
    ):
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            function(*arguments)
