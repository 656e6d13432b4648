"""Imported by the server that workers are forked from: they find imports and tiktoken's tables ready."""

import gc

from nanogpt.prepare import build
from nanogpt.tokenizer import gpt2

__all__ = ["build"]

gpt2().encode("")
gc.freeze()  # no collection in a worker copies these pages
