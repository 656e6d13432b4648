"""Continues from the parameters of another run, with a small learning rate, on a text of your choice.

    python -m experiments.finetune --init.run-dir runs/gpt2_124m --data.path shakespeare

The model has the shape of the run that it starts from, which may be OpenAI's GPT-2 (`python -m nanogpt.hf
import gpt2 --run-dir runs/openai`). Expected: the loss starts where the other run ended and does not jump.
"""

from pathlib import Path

from nanogpt.config import DataConfig, EvalConfig, InitConfig, OptimConfig, RunConfig, TrainConfig
from nanogpt.run import main

config = RunConfig(
    optim=OptimConfig(max_learning_rate=3e-5, min_learning_rate=3e-6, warmup_steps=10),
    data=DataConfig(batch_size=4, total_batch_size=32768),
    train=TrainConfig(max_steps=100),
    eval=EvalConfig(interval=20, tokens=65536),
    init=InitConfig(run_dir=Path("runs/gpt2_124m")),
    run_dir=Path("runs/finetune"),
)

if __name__ == "__main__":
    main(config)
