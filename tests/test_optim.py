"""Our optimizer algebra equals torch.optim, and its laws hold."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt import tree
from nanogpt.errors import UserError
from nanogpt.optim import (
    Transform,
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    dynamic_loss_scale,
    matrices,
    scale_by_learning_rate,
    warmup_cosine,
)

SHAPES = {
    "wte.weight": (5, 3),
    "h.0.attn.c_attn.bias": (4,),
    "ln_f.weight": (3,),
    "h.0.mlp.c_fc.weight": (3, 4),
}


def random_like(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def steps_of(
    optimizer: Transform, params: dict[str, Tensor], all_grads: list[dict[str, Tensor]]
) -> tuple[Any, Any]:
    opt_state = optimizer.init(params)
    for grads in all_grads:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = apply_updates(params, updates)
    return params, opt_state


def torch_adamw(
    params: dict[str, Tensor], all_grads: list[dict[str, Tensor]], **settings
) -> dict[str, Tensor]:
    """torch.optim.AdamW in nanoGPT's two groups: matrices decay, vectors do not."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    groups = [
        {"params": [leaf for leaf in params.values() if leaf.ndim >= 2]},
        {"params": [leaf for leaf in params.values() if leaf.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **settings)
    for grads in all_grads:
        for name, leaf in params.items():
            leaf.grad = grads[name].clone()
        optimizer.step()
    return {name: leaf.detach() for name, leaf in params.items()}


@pytest.mark.parametrize(
    ("settings", "of_torch"),
    [
        ({}, {}),
        (dict(b1=0.9, b2=0.95, weight_decay=0.1), dict(betas=(0.9, 0.95), weight_decay=0.1)),
        (
            dict(b1=0.0, b2=0.0, eps=1e-6, weight_decay=0.0),
            dict(betas=(0.0, 0.0), eps=1e-6, weight_decay=0.0),
        ),
    ],
)
def test_adamw_follows_torch_with_decay_on_matrices_only(settings: dict[str, Any], of_torch: dict[str, Any]):
    all_grads = [random_like(seed, scale=10.0 ** (seed - 8)) for seed in range(1, 6)]  # from 1e-7: eps counts
    ours, _ = steps_of(adamw(1e-2, **settings), random_like(0), all_grads)
    theirs = torch_adamw(random_like(0), all_grads, lr=1e-2, **of_torch)
    for name, leaf in theirs.items():
        # five steps of fp32 rounding
        torch.testing.assert_close(
            ours[name], leaf, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_matrices_are_decayed_and_vectors_are_not():
    assert matrices(random_like(0)) == {name: len(shape) == 2 for name, shape in SHAPES.items()}


def only_bias(params: dict[str, Any]) -> dict[str, bool]:
    return {name: name.endswith("bias") for name in params}


@pytest.mark.parametrize("mask", [only_bias, only_bias(SHAPES)], ids=["a function", "its result"])
def test_a_decay_mask_of_ones_own_is_honoured(mask: Any):
    zeros = tree.map(torch.zeros_like, random_like(0))
    optimizer = adamw(0.5, weight_decay=0.1, decay_mask=mask)
    updates, _ = optimizer.update(zeros, optimizer.init(zeros), random_like(0))
    assert {name for name, leaf in updates.items() if leaf.count_nonzero()} == {"h.0.attn.c_attn.bias"}


def test_an_update_leaves_its_arguments_as_they_were():
    optimizer = chain(clip_by_global_norm(0.1), adamw(1e-2, weight_decay=0.1))
    params, grads = random_like(0), random_like(1)
    opt_state = optimizer.init(params)
    optimizer.update(grads, opt_state, params)
    for given, fresh in (
        (params, random_like(0)),
        (grads, random_like(1)),
        (opt_state, optimizer.init(params)),
    ):
        assert all(
            one.equal(other) for one, other in zip(tree.leaves(given), tree.leaves(fresh), strict=True)
        )


@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
def test_clip_equals_torch_above_and_below_the_norm(max_norm: float):
    grads, clip = random_like(1), clip_by_global_norm(max_norm)
    ours, _ = clip.update(grads, clip.init(grads), random_like(0))
    theirs = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in grads.values()]
    for leaf, grad in zip(theirs, grads.values(), strict=True):
        leaf.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    for got, leaf in zip(ours.values(), theirs, strict=True):
        # torch adds 1e-6 to the norm, which is about 6 here
        torch.testing.assert_close(got, leaf.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("params_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grads_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (2, 3)])  # PyTorch lets a leaf of no dimensions widen others
def test_leaves_keep_their_dtype(params_dtype: torch.dtype, grads_dtype: torch.dtype, shape: tuple[int, ...]):
    params, grads = {"a": torch.ones(shape, dtype=params_dtype)}, {"a": torch.ones(shape, dtype=grads_dtype)}
    clipped = chain(clip_by_global_norm(0.5), adamw(0.1))
    for optimizer in (clipped, scale_by_learning_rate(0.1), dynamic_loss_scale(adamw(0.1))):
        moved = steps_of(optimizer, params, [grads] * 2)
        assert tree.diff(moved, (params, optimizer.init(params))) == []
        assert moved[0]["a"].max() < 1


def test_clipping_zero_gradients_gives_zeros():
    zeros, clip = tree.map(torch.zeros_like, random_like(0)), clip_by_global_norm(1.0)
    clipped, _ = clip.update(zeros, clip.init(zeros), zeros)
    assert all(leaf.equal(torch.zeros_like(leaf)) for leaf in clipped.values())


def test_chain_applies_its_transforms_from_left_to_right():
    grads, double = {"a": torch.tensor([3.0, 4.0])}, scale_by_learning_rate(-2.0)
    for transforms, norm in (
        ((clip_by_global_norm(1.0), double), 2.0),
        ((double, clip_by_global_norm(1.0)), 1.0),
    ):
        chained = chain(*transforms)
        updates, _ = chained.update(grads, chained.init(grads), grads)
        # one fp32 division
        torch.testing.assert_close(tree.global_norm(updates), torch.tensor(norm), rtol=1e-6, atol=0)


def test_the_schedule_warms_up_in_a_line_and_falls_along_half_a_cosine():
    schedule = warmup_cosine(6e-4, final=6e-5, warmup_steps=10, total_steps=110)
    expected = {0: 6e-5, 4: 3e-4, 9: 6e-4, 10: 6e-4, 60: 3.3e-4, 110: 6e-5, 10_000: 6e-5}
    expected[35] = 6e-5 + 5.4e-4 * 0.5 * (1 + math.cos(math.pi / 4))
    got = {step: float(schedule(torch.tensor(step))) for step in expected}
    assert got == pytest.approx(expected, rel=1e-6)  # fp32 has 24 bits


def test_a_schedule_may_be_one_step_of_warmup_and_one_more():
    schedule = warmup_cosine(1.0, final=0.5, warmup_steps=1, total_steps=2)
    assert [float(schedule(torch.tensor(step))) for step in range(3)] == [1.0, 1.0, 0.5]


def test_the_schedule_counts_updates_from_zero():
    rates = torch.tensor([1.0, 10.0, 100.0])
    optimizer = scale_by_learning_rate(lambda count: rates[count])
    params, opt_state = steps_of(optimizer, {"a": torch.zeros(())}, [{"a": torch.ones(())}] * 3)
    assert (float(params["a"]), int(opt_state.count)) == (-111.0, 3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of jvp
@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay"])
def test_a_setting_that_is_a_tensor_can_be_mapped_and_differentiated(setting: str):
    start, all_grads = random_like(0), [random_like(1)] * 2

    def size_after_two_updates(value: Any) -> Tensor:
        params, _ = steps_of(adamw(**{"learning_rate": 0.1} | {setting: value}), start, all_grads)
        return tree.global_norm(params)

    values, one = torch.tensor([0.1, 0.2]), torch.ones(())
    sizes = torch.func.vmap(size_after_two_updates)(values)
    expected = [size_after_two_updates(value) for value in values.tolist()]
    torch.testing.assert_close(sizes, torch.stack(expected))
    slope = torch.func.grad(size_after_two_updates)(values[0])
    ahead, behind = (size_after_two_updates(0.1 + change) for change in (0.01, -0.01))
    torch.testing.assert_close(slope, (ahead - behind) / 0.02, rtol=0.02, atol=0)  # a large change
    _, along = torch.func.jvp(size_after_two_updates, (values[0],), (one,))
    torch.testing.assert_close(along, slope)


@pytest.mark.parametrize("warmup_steps", [0, 100, 101])
def test_a_warmup_that_does_not_fit_is_refused(warmup_steps: int):
    with pytest.raises(
        UserError, match=f"^warmup takes {warmup_steps} of 100 steps, expected .* --optim.warmup-steps"
    ):
        warmup_cosine(1e-3, final=0.0, warmup_steps=warmup_steps, total_steps=100)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_clip_norm_that_is_not_positive_is_refused(max_norm: float):
    with pytest.raises(
        UserError, match=f"^the clip norm is {max_norm}, expected above 0; set --optim.gradient-clip"
    ):
        clip_by_global_norm(max_norm)


@pytest.mark.parametrize(("name", "beta"), [("b1", 1.0), ("b2", -0.1)])
def test_a_beta_out_of_range_is_refused(name: str, beta: float):
    with pytest.raises(
        UserError, match=f"^{name} is {beta}, expected at least 0 and below 1; set --optim.betas$"
    ):
        adamw(1e-3, **{name: beta})


def scaled(grads: dict[str, Tensor], opt_state: Any) -> dict[str, Tensor]:
    return tree.map(lambda g: g * opt_state.scale, grads)


def test_loss_scaling_does_not_change_what_the_optimizer_does():
    plain, scaling = adamw(1e-2), dynamic_loss_scale(adamw(1e-2), initial=2.0**10)
    params, opt_state = random_like(0), scaling.init(random_like(0))
    for seed in (1, 2, 3):
        updates, opt_state = scaling.update(scaled(random_like(seed), opt_state), opt_state, params)
        params = apply_updates(params, updates)
    expected, _ = steps_of(plain, random_like(0), [random_like(seed) for seed in (1, 2, 3)])
    assert all(params[name].equal(leaf) for name, leaf in expected.items())  # a power of two costs no bit


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(bad: float):
    scaling = dynamic_loss_scale(adamw(1e-2), initial=8.0)
    params, before = random_like(0), scaling.init(random_like(0))
    _, before = scaling.update(scaled(random_like(1), before), before, params)
    grads = random_like(2)
    grads["ln_f.weight"][1] = bad
    updates, after = scaling.update(grads, before, params)
    assert all(leaf.count_nonzero() == 0 for leaf in updates.values())
    assert (float(after.scale), int(after.finite_steps)) == (4.0, 0)
    assert all(a.equal(b) for a, b in zip(tree.leaves(after.inner), tree.leaves(before.inner), strict=True))


def test_the_scale_doubles_after_an_interval_of_finite_steps_and_not_beyond_its_limit():
    scaling = dynamic_loss_scale(adamw(1e-2), initial=2.0, growth_interval=3, largest=8.0)
    params, opt_state, scales = random_like(0), scaling.init(random_like(0)), []
    for seed in range(12):
        _, opt_state = scaling.update(random_like(seed), opt_state, params)
        scales.append(float(opt_state.scale))
    assert scales == [2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8]


def test_an_overflow_starts_the_interval_again_and_the_scale_stays_at_least_1():
    scaling = dynamic_loss_scale(adamw(1e-2), initial=2.0, growth_interval=2)
    params, opt_state, scales = random_like(0), scaling.init(random_like(0)), []
    for finite in (True, False, False, True, True):
        grads = tree.map(lambda g, finite=finite: g if finite else g * math.inf, random_like(1))
        _, opt_state = scaling.update(grads, opt_state, params)
        scales.append(float(opt_state.scale))
    assert scales == [2, 1, 1, 1, 2]
