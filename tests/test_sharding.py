"""A step on a mesh is the step of one process: real ranks with gloo, on sizes that do not divide."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_job import CONFIG, LAYOUTS, STEPS, Seen

from nanogpt.config import MeshConfig
from nanogpt.errors import UserError
from nanogpt.sharding import mesh_shape

ROOT = Path(__file__).parent.parent
MESHES = [name for name in LAYOUTS if name != "1"]
Every = dict[str, list[Seen]]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Every:
    """What each rank of each layout saw."""
    folder = tmp_path_factory.mktemp("layouts")
    run = subprocess.run(
        [sys.executable, ROOT / "tests/sharded_job.py", folder],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    sizes = {name: layout.replicate * layout.shard for name, layout in LAYOUTS.items()}
    return {
        name: [Seen(*torch.load(folder / f"{name}-{rank}.pt")) for rank in range(size)]
        for name, size in sizes.items()
    }


def check_close(got: list[float] | None, expected: list[float] | None, relative: float) -> None:
    assert got
    assert got == pytest.approx(expected, rel=relative, abs=0)


def test_what_is_not_given_of_a_mesh_follows() -> None:
    def shape(shard: int | None, replicate: int | None) -> tuple[int, int]:
        return mesh_shape(shard=shard, replicate=replicate, size=16, local_size=8)

    assert shape(None, None) == (2, 8)  # sharded within a machine, replicated across machines
    assert shape(1, None) == (16, 1)
    assert shape(None, 1) == (1, 16)
    assert shape(4, 4) == (4, 4)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e30])
def test_a_timeout_that_no_collective_can_wait_for_is_refused(seconds: float) -> None:
    with pytest.raises(UserError) as caught:
        MeshConfig(timeout_s=seconds)
    assert str(caught.value) == (
        f"the timeout is {seconds} s, expected above 0 and at most 1,000,000; set --mesh.timeout-s"
    )


@pytest.mark.parametrize(
    ("shard", "replicate"),
    [(3, None), (None, 3), (2, 2), (32, None), (None, 32), (0, None), (None, 0), (-4, -4)],
)
def test_a_mesh_that_is_not_the_processes_is_refused(shard: int | None, replicate: int | None) -> None:
    with pytest.raises(UserError, match="cannot make a mesh of 16 processes"):
        mesh_shape(shard=shard, replicate=replicate, size=16, local_size=8)


def test_layouts_differ_in_accumulation_and_placement(every: Every) -> None:
    assert {name: ranks[0].accumulation for name, ranks in every.items()} == {
        **{"1": 2, "2": 2, "3": 2, "4": 1, "2 x 2": 1, "2 replicas": 2, "2, resharded": 2}
    }
    sharded, both = "(Shard(dim=0),)", "(Replicate(), Shard(dim=0))"
    assert {name: ranks[0].placements - {""} for name, ranks in every.items()} == {
        **{"1": set(), "2": {sharded}, "3": {sharded}, "4": {sharded}, "2, resharded": {sharded}},
        **{"2 x 2": {both}, "2 replicas": {both}},
    }


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_starts_with_the_parameters_of_one_process_bit_for_bit(every: Every, name: str) -> None:
    (alone,) = every["1"]
    for rank in every[name]:
        assert rank.start.keys() == alone.start.keys()
        assert [leaf for leaf, value in rank.start.items() if not value.equal(alone.start[leaf])] == []


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_those_of_one_process(every: Every, name: str) -> None:
    (alone,) = every["1"]
    for rank in every[name]:
        assert rank.grads.keys() == alone.grads.keys()
        errors = {
            leaf: float((grad - alone.grads[leaf]).norm() / alone.grads[leaf].norm())
            for leaf, grad in rank.grads.items()
        }
        # Sums in another order: 1e-6 at most is seen.
        assert {leaf: error for leaf, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("name", MESHES)
def test_losses_and_gradient_norms_are_those_of_one_process_on_every_rank(every: Every, name: str) -> None:
    (alone,) = every["1"]
    assert alone.losses[0] - alone.losses[-1] > 0.1  # it learns, or a wrong update would not show
    for rank in every[name]:
        assert len(rank.losses) == STEPS
        check_close(rank.losses, alone.losses, 1e-5)
        check_close(rank.norms, alone.norms, 1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_the_validation_loss_is_that_of_one_process(every: Every, name: str) -> None:
    (alone,) = every["1"]
    for rank in every[name]:
        check_close(rank.val_losses, alone.val_losses, 1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_changed_by_hand_change_the_loss(every: Every, name: str) -> None:
    """FSDP2 by itself would compute with its own parameters, whatever it is given."""
    (alone,) = every["1"]
    for rank in every[name]:
        first, changed, again = rank.changed_losses
        assert abs(changed - first) > 1e-3 * first
        assert again == first
        check_close(rank.changed_losses, alone.changed_losses, 1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_state_is_left_alone_unless_it_is_given_away(every: Every, name: str) -> None:
    for rank in every[name]:
        assert rank.is_untouched
        assert rank.is_donated


@pytest.mark.parametrize("name", MESHES)
def test_bfloat16_is_close_to_that_of_one_process(every: Every, name: str) -> None:
    for rank in every[name]:
        # 8 bits of mantissa, averaged over 108 targets; and another arithmetic than fp32's.
        check_close(rank.bfloat16_losses, every["1"][0].bfloat16_losses, 1e-3)
        assert rank.bfloat16_losses != rank.losses[:3]


def test_float16_with_loss_scaling_is_close_to_that_of_one_process(every: Every) -> None:
    for rank in every["2 x 2"]:
        check_close(rank.float16_losses, every["1"][0].float16_losses, 1e-4)


def test_an_optimizer_that_sees_the_whole_tree_does_the_same_on_a_mesh(every: Every) -> None:
    for rank in every["2 x 2"]:
        check_close(rank.custom_losses, every["1"][0].custom_losses, 1e-5)


def test_losses_are_those_of_the_ranks_of_the_mesh_whatever_others_compute(every: Every) -> None:
    (alone,) = every["1"]
    for index, rank in enumerate(every["2 x 2"]):
        expected = [alone.changed_losses[index // 2], alone.val_losses[0]]
        check_close(rank.half_losses, expected, 1e-5)


def test_parameters_that_are_not_laid_out_on_the_mesh_are_refused(every: Every) -> None:
    for rank in every["2"]:
        elsewhere, missing = "wte.weight is not laid out on the mesh of this step", "ln_f.bias is missing"
        assert rank.refusals is not None
        said = [
            sentence.partition(", expected a DTensor with this rank's rows; make")[0]
            for sentence in rank.refusals
        ]
        assert said[:4] == [elsewhere, elsewhere, elsewhere, missing]


def test_targets_of_another_shape_are_refused_on_a_mesh(every: Every) -> None:
    for rank in every["2"]:
        assert rank.refusals is not None
        turned = (
            "the targets of a batch have shape [2, 9, 3], its inputs [2, 3, 9], expected [A, B, T] for both"
        )
        assert [sentence.partition(";")[0] for sentence in rank.refusals[4:]] == [turned, turned]


def test_an_evaluation_leaves_no_gathered_parameters_behind(every: Every) -> None:
    total = sum(leaf.nbytes for leaf in every["1"][0].start.values())
    for rank in every["2"]:
        assert rank.gathered_bytes is not None
        most, left = rank.gathered_bytes
        assert most >= total
        assert left == 0


def test_compiled_steps_equal_eager_ones_and_are_compiled_once(every: Every) -> None:
    for rank in every["2"]:
        check_close(rank.compiled_losses, rank.losses[:3], 1e-6)
        # A block, a chunk of the head, the update of a leaf.
        assert rank.graphs == [3, 3, 3]


def test_a_state_is_made_leaf_by_leaf_and_only_the_rows_of_the_rank_stay(every: Every) -> None:
    total = sum(leaf.nbytes for leaf in every["1"][0].start.values())
    for rank in every["4"]:
        assert rank.whole_leaves == 1
        assert rank.own_bytes is not None
        assert rank.own_bytes == rank.stored_bytes < total * 3 / 2  # parameters and two moments, in quarters


def test_each_rank_drops_features_of_its_own(every: Every) -> None:
    for rank in every["2"]:
        assert rank.dropped_losses
        on_mesh, first, second = rank.dropped_losses
        assert first != second
        check_close([on_mesh], [(first + second) / 2], 1e-6)  # fp32 rounding


def test_gradients_of_several_microsteps_are_added_up_over_the_ranks_once(every: Every) -> None:
    for rank in every["2"]:
        assert rank.accumulation == 2
        assert rank.reductions == CONFIG.n_layer + 1  # one for each block, and one for the rest


def test_blocks_are_gathered_once_more_for_backward_if_they_are_resharded_after_forward(every: Every) -> None:
    """In each of two microsteps; everything outside of the blocks is gathered once in each."""
    blocks = CONFIG.n_layer
    assert [rank.gathers for rank in every["2"]] == [2 * (blocks + 1)] * 2
    assert [rank.gathers for rank in every["2, resharded"]] == [2 * (2 * blocks + 1)] * 2


def test_blocks_compute_in_bfloat16_and_their_gradients_are_added_up_in_float32(every: Every) -> None:
    for rank in every["2"]:
        assert rank.dtypes == {
            **{"blocks": {"torch.bfloat16"}, "outside": {"torch.float32"}, "sums": {"torch.float32"}}
        }
