"""Every setting's range is what its help says: its ends are in it, and what is just beyond is not."""

import dataclasses
import math
from typing import Any

import pytest

from nanogpt.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from nanogpt.errors import UserError

TINY, HUGE = 5e-324, 1.7e308
"""The smallest number above 0 and about the largest."""


@pytest.mark.parametrize(
    ("group", "name", "inside", "outside"),
    [
        (OptimConfig, "max_learning_rate", [6e-5, HUGE], [5e-5, math.inf, math.nan]),
        (OptimConfig, "min_learning_rate", [0.0, 6e-4], [-TINY, 7e-4, math.nan]),
        (OptimConfig, "warmup_steps", [1], [0]),
        (OptimConfig, "weight_decay", [0.0, HUGE], [-TINY, math.inf, math.nan]),
        (OptimConfig, "gradient_clip_norm", [TINY, math.inf], [0.0, math.nan]),
        (OptimConfig, "betas", [(0.0, 0.0)], [(1.0, 0.9), (0.9, 1.0), (-TINY, 0.9), (0.9, -TINY)]),
        (DataConfig, "batch_size", [1], [0]),
        (DataConfig, "total_batch_size", [1], [0]),
        (TrainConfig, "max_steps", [2, 2**31 - 1], [1, 2**31]),  # steps are counted in 32 bits
        (TrainConfig, "stop_after", [None, 1], [0]),
        (TrainConfig, "seed", [0, 2**62], [-1, 2**62 + 1]),
        (MeshConfig, "shard", [None, 1], [0]),
        (MeshConfig, "replicate", [None, 1], [0]),
        (MeshConfig, "timeout_s", [TINY, 1e6], [0.0, 1e6 + 1]),
        (EvalConfig, "interval", [None, 1], [0]),
        (EvalConfig, "tokens", [1], [0]),
        (CheckpointConfig, "interval", [None, 1], [0]),
        (CheckpointConfig, "keep", [1], [0]),
        (SampleConfig, "interval", [None, 1], [0]),
        (SampleConfig, "prompt", ["\n"], [""]),
        (SampleConfig, "tokens", [1], [0]),
        (SampleConfig, "temperature", [0.0, HUGE], [-TINY, math.inf, math.nan]),
        (SampleConfig, "top_k", [None, 1], [0]),
    ],
)
def test_a_setting_takes_the_ends_of_its_range_and_nothing_beyond(
    group: type, name: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        assert getattr(group(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(UserError, match="expected"):
            group(**{name: value})


def test_a_learning_rate_of_0_alone_is_refused() -> None:
    with pytest.raises(UserError, match="max above 0"):
        OptimConfig(max_learning_rate=0.0, min_learning_rate=0.0)


def test_the_schedule_has_a_step_after_its_warmup() -> None:
    run = RunConfig(optim=OptimConfig(warmup_steps=2), train=TrainConfig(max_steps=3))
    with pytest.raises(UserError, match="warmup takes 2 of 2 steps, expected fewer"):
        dataclasses.replace(run, train=TrainConfig(max_steps=2))


@pytest.mark.parametrize(("stop_after", "last"), [(None, 20), (1, 1), (20, 20), (21, 20)])
def test_a_start_ends_where_it_is_told_to_and_at_the_schedules_end(stop_after: int | None, last: int) -> None:
    train = TrainConfig(max_steps=20, stop_after=stop_after)
    assert RunConfig(optim=OptimConfig(warmup_steps=1), train=train).last_step == last
