"""GPT-2 124M for an evening's first run: `make train`.

The model and the step of gpt2_124m on the bundled Shakespeare, with a budget for the machine at hand. A CPU
gets 40 steps: of 4 x 1,024 tokens if it has fast bfloat16, else (most desktop and older server CPUs are fast
only in float32) of one sequence of 640, so that the run ends in minutes on two cores. A GPU gets 100 steps of
the real batch. Expected: the loss falls from 10.9 to below 6.6 at step 40; on a GPU to below 5 at step 100
(not measured).
"""

import dataclasses
import os
import shlex
import sys

import torch

from experiments.gpt2_124m import config as gpt2_124m
from nanogpt import perf
from nanogpt.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from nanogpt.run import main

NEXT = """
{run_dir} is at step {step}. What next:
  the picture      {run_dir}/loss.png
  more text        {python} -m nanogpt.sample --run-dir {quoted} --prompt "KING:"
  readable text    make shakespeare
  the real run     {python} -m nanogpt.prepare openwebtext --out data/openwebtext
                   {python} -m experiments.gpt2_124m --run-dir runs/openwebtext
  on 8 GPUs        make ddp-train NGPUS=8 ARGS='--run-dir runs/openwebtext'"""


def budget(hardware: perf.Hardware) -> RunConfig:
    """gpt2_124m cut down to what `hardware` does in minutes."""
    common = dict(
        optim=OptimConfig(warmup_steps=5),
        checkpoint=CheckpointConfig(interval=None, keep=1),
        sample=SampleConfig(interval=None, tokens=60),
    )
    if hardware.device.type == "cuda":
        return dataclasses.replace(
            gpt2_124m,
            data=DataConfig(path="shakespeare"),
            train=TrainConfig(max_steps=100),
            eval=EvalConfig(interval=20),
            **common,
        )
    model, sequences = gpt2_124m.model, 4
    if not hardware.bf16_fast:
        model, sequences = dataclasses.replace(model, block_size=640), 1
    return dataclasses.replace(
        gpt2_124m,
        model=model,
        data=DataConfig(
            path="shakespeare", batch_size=sequences, total_batch_size=sequences * model.block_size
        ),
        train=TrainConfig(max_steps=40),
        eval=EvalConfig(interval=None, tokens=2 * sequences * model.block_size),
        **common,
    )


def quickstart(default: RunConfig) -> None:
    """Runs as the command line says, and then prints what to do next."""
    result = main(default)
    if result is not None:
        python, quoted = os.path.relpath(sys.executable), shlex.quote(str(result.run_dir))
        print(NEXT.format(python=python, run_dir=result.run_dir, quoted=quoted, step=result.step))


config = budget(perf.detect(torch.device("cuda" if torch.cuda.is_available() else "cpu")))

if __name__ == "__main__":
    quickstart(config)
