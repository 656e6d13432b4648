"""GPT-2 124M on OpenWebText, for one epoch of 9 billion tokens.

Expected (published, not measured here): a validation loss of about 3.1 after this one epoch. nanoGPT, on the
same data and batch but for 600,000 steps, reports 2.85.
"""

from pathlib import Path

from nanogpt.config import RunConfig
from nanogpt.run import main

config = RunConfig(run_dir=Path("runs/gpt2_124m"))

if __name__ == "__main__":
    main(config)
