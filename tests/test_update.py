"""An optimizer applied leaf by leaf is the optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt import optim, tree
from nanogpt.errors import UserError
from nanogpt.graph import as_one_graph
from nanogpt.model import GPT2Config, Params, init
from nanogpt.optim import Transform, adamw, chain, clip_by_global_norm, dynamic_loss_scale
from nanogpt.update import make_update

CONFIG = GPT2Config(vocab_size=11, block_size=4, n_layer=3, n_head=1, n_embd=2)
SCHEDULE = optim.warmup_cosine(0.1, final=0.01, warmup_steps=2, total_steps=9)


def slower_and_slower() -> Transform:
    """Divides by the number of the update, which every leaf reads from the state."""

    def update(updates: Params, state: Any, params: Params, numbers: Any) -> Any:
        return tree.map(lambda u: u / (state.count + 1), updates), optim.ScheduleState(state.count + 1)

    return optim.elementwise(lambda params: optim.ScheduleState(torch.tensor(0)), update)


def only_embeddings(params: Params) -> dict[str, bool]:
    return {name: name == "wte.weight" for name in params}


OPTIMIZERS = {
    "clip, adamw": chain(clip_by_global_norm(0.5), adamw(SCHEDULE, weight_decay=0.3)),
    "adamw alone": adamw(SCHEDULE, weight_decay=0.3),
    "a mask by name": chain(clip_by_global_norm(0.5), adamw(SCHEDULE, decay_mask=only_embeddings)),
    "a count": chain(clip_by_global_norm(0.5), slower_and_slower()),
    "clip last": chain(optim.scale_by_adam(0.9, 0.99, 1e-8), clip_by_global_norm(0.5)),
    "two clips": chain(clip_by_global_norm(0.5), clip_by_global_norm(0.25), adamw(SCHEDULE)),
    "clip alone": clip_by_global_norm(0.5),
    "loss scale": dynamic_loss_scale(chain(clip_by_global_norm(0.5), adamw(SCHEDULE))),
}
BY_LEAF = {"clip, adamw", "adamw alone", "a mask by name", "a count"}


def grads_of(step: int) -> Params:
    generator = torch.Generator().manual_seed(step)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator), params_of())


def params_of() -> Params:
    return init(CONFIG, torch.Generator().manual_seed(0))


def plain(optimizer: Transform, steps: int) -> Any:
    params, opt_state = params_of(), optimizer.init(params_of())
    for step in range(steps):
        updates, opt_state = optimizer.update(grads_of(step), opt_state, params)
        params = optim.apply_updates(params, updates)
    return params, opt_state


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_the_optimizers_on_the_whole_tree(name: str, donate: bool) -> None:
    optimizer = OPTIMIZERS[name]
    update = make_update(optimizer, donate=donate, compile=False)
    params, opt_state = given = params_of(), optimizer.init(params_of())
    before = tree.map(torch.clone, given)
    for step in range(3):
        grads = grads_of(step)
        params, opt_state = update(grads, tree.global_norm(grads), opt_state, params)
    expected = plain(optimizer, 3)
    assert tree.diff((params, opt_state), expected) == []
    for path, leaf in tree.paths(expected).items():
        assert torch.equal(tree.paths((params, opt_state))[path], leaf), path
    same_memory = [a.data_ptr() for a in tree.leaves(given)] == [
        a.data_ptr() for a in tree.leaves((params, opt_state))
    ]
    assert same_memory == donate
    assert all(map(torch.equal, tree.leaves(given), tree.leaves(before))) != donate


def delayed(params: Params, view: Callable[[Tensor], Tensor]) -> Transform:
    """Descends the last three gradients: hands the one before on to another place of its state."""

    def update(updates: Params, state: Any, params: Params) -> Any:
        before, earlier = state
        sums = tree.map(lambda g, b, e: -0.1 * (g + b + e), updates, before, earlier)
        return sums, (updates, tree.map(view, before))

    zeros = tree.map(torch.zeros_like, params)
    return Transform(lambda params: (zeros, tree.map(torch.zeros_like, zeros)), update)


@pytest.mark.parametrize("view", [lambda leaf: leaf, Tensor.detach], ids=["itself", "a view"])
def test_what_is_handed_on_in_the_state_is_read_before_it_is_overwritten(
    view: Callable[[Tensor], Tensor],
) -> None:
    results = []
    for donate in (False, True):
        optimizer = delayed(params_of(), view)
        update = make_update(optimizer, donate=donate, compile=False)
        params, opt_state = params_of(), optimizer.init(params_of())
        for step in range(4):
            params, opt_state = update(grads_of(step), torch.ones(()), opt_state, params)
        results.append((params, opt_state))
    assert all(map(torch.equal, *map(tree.leaves, results)))


@pytest.mark.parametrize("view", [lambda leaf: leaf, Tensor.detach], ids=["itself", "a view"])
@pytest.mark.parametrize("compile", [False, True])
def test_an_elementwise_transform_that_hands_on_is_refused_with_donation(
    compile: bool, view: Callable[[Tensor], Tensor]
) -> None:
    optimizer = optim.elementwise(
        lambda params: (params, params), lambda g, state, p, _: (g, (g, tree.map(view, state[0])))
    )
    update = make_update(optimizer, donate=True, compile=compile)
    params = params_of()
    with pytest.raises(UserError, match="hands a leaf on to another place"):
        update(grads_of(0), torch.ones(()), optimizer.init(params_of()), params)
    assert all(map(torch.equal, tree.leaves(params), tree.leaves(params_of())))


def test_a_parameter_that_is_not_contiguous_is_refused() -> None:
    update = make_update(adamw(0.1), donate=True, compile=False)
    params = {"w": torch.ones(3, 2).t()}
    with pytest.raises(UserError, match=r"shape \[2, 3\] has the strides \[1, 2\], expected a contiguous"):
        update(params, torch.ones(()), adamw(0.1).init(params), params)


def test_a_gradient_may_have_any_layout() -> None:
    """As on MPS, where a product's gradient comes transposed."""
    update, params, grads = make_update(adamw(0.1), donate=False, compile=False), params_of(), grads_of(0)
    turned = {name: leaf.t().contiguous().t() if leaf.ndim == 2 else leaf for name, leaf in grads.items()}
    assert not all(leaf.is_contiguous() for leaf in turned.values())
    new, _ = update(turned, torch.ones(()), adamw(0.1).init(params), params)
    expected, _ = update(grads, torch.ones(()), adamw(0.1).init(params), params)
    assert all(map(torch.equal, tree.leaves(new), tree.leaves(expected)))


def test_a_loss_scale_inside_of_a_chain_is_refused() -> None:
    with pytest.raises(UserError, match="wrap the whole chain in it"):
        chain(clip_by_global_norm(1.0), dynamic_loss_scale(adamw(0.1))).init(params_of())


def test_which_optimizers_go_leaf_by_leaf() -> None:
    assert {name for name, optimizer in OPTIMIZERS.items() if optim.split(optimizer)} == BY_LEAF


def test_a_tree_split_and_joined_is_the_tree() -> None:
    params = {"a": torch.ones(1), "b": torch.zeros(2)}
    whole = (params, ((), optim.AdamState(torch.tensor(3), params, params), {"scale": torch.tensor(2)}))
    parts = tree.split(whole, params)
    assert list(parts) == ["a", "b"]
    leaf, (empty, adam, scale) = parts["b"]
    assert (empty, int(adam.count), int(scale["scale"])) == ((), 3, 2)
    assert leaf["leaf"] is adam.mu["leaf"] is adam.nu["leaf"] is params["b"]
    slots = {name: tree.only_slots(part, {"leaf": params[name]}) for name, part in parts.items()}
    assert slots["a"][1][1].count is slots["a"][1][2]["scale"] is None
    joined = tree.join(whole, params, slots, parts["b"])
    assert tree.diff(joined, whole) == []
    assert all(a is b for a, b in zip(tree.leaves(joined), tree.leaves(whole), strict=True))


def test_one_graph_updates_leaves_of_all_sizes_and_none() -> None:
    """As a rank has them that got no rows of a leaf, or one element."""
    shapes = [(3, 4), (2, 5), (7,), (9,), (1,), (0, 4), (1, 1)]
    params = {str(shape): torch.ones(shape) for shape in shapes}
    optimizer = OPTIMIZERS["clip, adamw"]
    update = make_update(optimizer, donate=False, compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    grads, opt_state = tree.map(torch.ones_like, params), optimizer.init(params)
    got, _ = update(grads, tree.global_norm(grads), opt_state, params)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    updates, _ = optimizer.update(grads, opt_state, params)
    for name, leaf in optim.apply_updates(params, updates).items():
        torch.testing.assert_close(got[name], leaf, rtol=1e-6, atol=0)


def test_functions_of_one_source_are_compiled_apart() -> None:
    def adder(number: int) -> Any:
        def add(x: Tensor) -> Tensor:
            return x + number

        return as_one_graph(add)

    with torch._dynamo.config.patch(recompile_limit=1):  # together they would be beyond it
        assert [int(adder(number)(torch.zeros(()))) for number in (1, 2)] == [1, 2]
