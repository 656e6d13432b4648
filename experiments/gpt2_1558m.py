"""GPT-2 XL, 1,558M parameters, on OpenWebText for one epoch.

Expected (predicted by the scaling of published runs, not measured here): a validation loss of 2.5 to 2.7. The
peak learning rate is that of Brown et al. 2020, table 2.1, for the nearest size.
"""

from pathlib import Path

from nanogpt.config import DataConfig, OptimConfig, RunConfig
from nanogpt.model import GPT2Config
from nanogpt.run import main

config = RunConfig(
    model=GPT2Config.named("gpt2-xl"),
    optim=OptimConfig(max_learning_rate=2e-4, min_learning_rate=2e-5),
    data=DataConfig(batch_size=8),
    run_dir=Path("runs/gpt2_1558m"),
)

if __name__ == "__main__":
    main(config)
