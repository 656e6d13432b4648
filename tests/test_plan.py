"""The plan: what a run says before it does anything."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from nanogpt import perf
from nanogpt.config import RunConfig, TrainConfig
from nanogpt.data import BatchSpec
from nanogpt.dataset import Dataset
from nanogpt.plan import Plan, plan_text

GOLDEN = Path(__file__).parent / "golden/plan.txt"
REGENERATE = "python tests/test_plan.py"
A100 = perf.Hardware(
    torch.device("cuda"), "NVIDIA A100-SXM4-80GB", 32, 85 * 10**9, 84 * 10**9, bf16_fast=True, fp16_fast=True
)


def plan_of_gpt2() -> Plan:
    """GPT-2 124M at its defaults on an A100, going on from step 1,000."""
    tokens = np.zeros(9_035_582_198 // 10**4, dtype=np.uint16)
    dataset = Dataset(Path("data/owt"), tokens, tokens, None, "", None, "a note")
    spec = BatchSpec(block_size=1024, batch_size=64, total_batch_size=524288, seed=0)
    peak_flops, source = perf.peak_flops(A100, "bfloat16")
    return Plan(RunConfig(), dataset, spec, A100, "bfloat16", True, peak_flops, source, 1000)


def test_the_plan_of_gpt2_on_an_a100_is_the_pinned_one() -> None:
    assert plan_text(plan_of_gpt2()) + "\n" == GOLDEN.read_text(), f"where it is meant: {REGENERATE}"


def test_the_plan_has_a_line_for_each_subject() -> None:
    subjects = [line.split()[0] for line in plan_text(plan_of_gpt2()).splitlines()]
    assert subjects == ["model", "device", "data", "step", "epoch", "memory", "compute", "files"]


def test_the_plan_ends_where_this_start_of_the_run_ends() -> None:
    plan = plan_of_gpt2()
    config = dataclasses.replace(plan.config, train=TrainConfig(stop_after=1500))
    assert "this run is steps 1000 to 1500 of 17234" in plan_text(plan._replace(config=config))


def test_the_plan_of_several_devices_divides_the_state_and_the_step() -> None:
    plan = plan_of_gpt2()
    spec = dataclasses.replace(plan.spec, process_count=8)
    text = plan_text(plan._replace(spec=spec, mesh=(2, 4), compile=False, optimizer_slots=3))
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["mesh"] == "2 replica(s) of the state, each divided among 4 process(es)"
    assert rows["device"].endswith(", bfloat16, eager")
    assert "= 8 device(s) x 1 microstep(s) x 64 sequences" in rows["step"]
    assert "parameters 124.4 MB, optimizer state 373.3 MB, " in rows["memory"]  # quarters of 497.8 MB, x 3
    assert "a step is at least 0.18 s and the run 48:36 at 312 TFLOP/s" in rows["compute"]  # eighths


if __name__ == "__main__":
    GOLDEN.write_text(plan_text(plan_of_gpt2()) + "\n")
