"""Pytrees: leaves have names, trees come back from their leaves, and a difference is a sentence."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nanogpt import tree


class State(NamedTuple):
    step: Tensor
    params: dict[str, Tensor]
    opt_state: tuple[Any, ...]


def make_state() -> State:
    params = {"wte.weight": torch.arange(6.0).view(3, 2), "ln_f.bias": torch.ones(2)}
    return State(torch.tensor(7), params, ((), [torch.zeros(1)]))


def test_only_what_shares_memory_is_copied_apart():
    kept, whole = torch.zeros(2), torch.arange(4.0)
    twin = torch.ones(3)
    got = tree.apart({"kept": kept, "view": whole[1:], "twin": twin, "again": twin}, [whole])
    assert got["kept"] is kept
    assert got["twin"] is twin
    assert got["view"].equal(whole[1:])
    assert got["again"].equal(twin)
    memories = [leaf.untyped_storage().data_ptr() for leaf in (whole, *got.values())]
    assert len(set(memories)) == len(memories)


def test_paths_join_fields_keys_and_positions():
    assert list(tree.paths(make_state())) == [
        "step",
        "params/wte.weight",
        "params/ln_f.bias",
        "opt_state/1/0",
    ]


def test_leaves_come_in_the_order_of_paths():
    state = make_state()
    assert [id(leaf) for leaf in tree.leaves(state)] == [id(leaf) for leaf in tree.paths(state).values()]


def test_unflatten_undoes_leaves():
    state = make_state()
    again = tree.unflatten(state, tree.leaves(state))
    assert isinstance(again, State)
    assert again.opt_state[0] == ()
    assert all(leaf is tree.paths(state)[name] for name, leaf in tree.paths(again).items())


def test_map_keeps_the_structure_and_pairs_leaves_by_place():
    state = make_state()
    doubled = tree.map(lambda a, b: a + b, state, state)
    assert isinstance(doubled, State)
    assert all(leaf.equal(2 * tree.paths(state)[name]) for name, leaf in tree.paths(doubled).items())


def test_global_norm_is_that_of_one_long_vector():
    generator = torch.Generator().manual_seed(0)
    leaves = {"a": torch.randn(3, 5, generator=generator), "b": (torch.randn(7, generator=generator),)}
    long = torch.cat([leaf.flatten() for leaf in tree.leaves(leaves)])
    # one rounding of a sum of 22 squares
    torch.testing.assert_close(tree.global_norm(leaves), long.norm(), rtol=1e-6, atol=0)


def test_global_norm_of_half_precision_is_summed_in_fp32():
    leaf = torch.full((1000,), 300.0, dtype=torch.float16)  # 300 squared is beyond float16
    norm = tree.global_norm([leaf])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.tensor(300 * 1000**0.5), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of jvp
def test_global_norm_has_forward_and_second_derivatives():
    x, direction = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])

    def norm(x: Tensor) -> Tensor:
        return tree.global_norm({"a": x[:1], "b": x[1:]})

    slope = torch.func.jvp(norm, (x,), (direction,))[1]
    curvature = torch.func.hessian(norm)(x)
    # x / |x| and (1 - x x^T / |x|^2) / |x|
    torch.testing.assert_close(slope, torch.tensor(0.6))
    torch.testing.assert_close(curvature, torch.tensor([[0.128, -0.096], [-0.096, 0.072]]))


def test_equal_trees_have_no_difference():
    assert tree.diff(make_state(), make_state()) == []


def test_diff_names_what_is_missing_what_is_extra_and_what_is_wrong():
    got = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16), "new": torch.zeros(1)}
    expected = {"a": torch.zeros(4), "b": torch.zeros(2), "gone": torch.zeros(1)}
    assert tree.diff(got, expected) == [
        "gone is missing",
        "new is not expected",
        "a is float32[3], expected float32[4]",
        "b is bfloat16[2], expected float32[2]",
    ]


def test_diff_takes_arrays_for_tensors():
    assert tree.diff({"a": np.zeros((2, 3), np.float32)}, {"a": torch.zeros(2, 3)}) == []
