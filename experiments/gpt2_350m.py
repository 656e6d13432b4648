"""GPT-2 medium, 350M parameters, on OpenWebText for one epoch.

Expected (predicted by the scaling of published runs, not measured here): a validation loss of 2.8 to 2.95.
The peak learning rate is that of Brown et al. 2020, table 2.1, for this size.
"""

from pathlib import Path

from nanogpt.config import DataConfig, OptimConfig, RunConfig
from nanogpt.model import GPT2Config
from nanogpt.run import main

config = RunConfig(
    model=GPT2Config.named("gpt2-medium"),
    optim=OptimConfig(max_learning_rate=3e-4, min_learning_rate=3e-5),
    data=DataConfig(batch_size=32),
    run_dir=Path("runs/gpt2_350m"),
)

if __name__ == "__main__":
    main(config)
