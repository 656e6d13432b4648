"""A small character model of the bundled Shakespeare: `make shakespeare`.

1,000 steps of 2,048 characters. Guessing among 70 characters costs 4.25 nats; a validation loss well below 2
is expected, with text in the form of a play (not measured to the end with the step as it is now).
"""

from pathlib import Path

from nanogpt.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from nanogpt.model import GPT2Config
from nanogpt.run import main

config = RunConfig(
    model=GPT2Config(vocab_size=70, block_size=128, n_layer=4, n_head=4, n_embd=192),
    optim=OptimConfig(max_learning_rate=3e-3, min_learning_rate=1e-4, warmup_steps=50, weight_decay=0.1),
    data=DataConfig(path="shakespeare-char", batch_size=16, total_batch_size=2048),
    train=TrainConfig(max_steps=1000, compile=False),
    eval=EvalConfig(interval=250, tokens=32768),
    checkpoint=CheckpointConfig(interval=500, keep=1),
    sample=SampleConfig(interval=250, tokens=120, top_k=None),
    run_dir=Path("runs/shakespeare"),
)

if __name__ == "__main__":
    main(config)
