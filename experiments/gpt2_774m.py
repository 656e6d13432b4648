"""GPT-2 large, 774M parameters, on OpenWebText for one epoch.

Expected (predicted by the scaling of published runs, not measured here): a validation loss of 2.65 to 2.8.
The peak learning rate is that of Brown et al. 2020, table 2.1, for the nearest size.
"""

from pathlib import Path

from nanogpt.config import DataConfig, OptimConfig, RunConfig
from nanogpt.model import GPT2Config
from nanogpt.run import main

config = RunConfig(
    model=GPT2Config.named("gpt2-large"),
    optim=OptimConfig(max_learning_rate=2.5e-4, min_learning_rate=2.5e-5),
    data=DataConfig(batch_size=16),
    run_dir=Path("runs/gpt2_774m"),
)

if __name__ == "__main__":
    main(config)
