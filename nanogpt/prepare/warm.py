"""Imported by the server that workers are forked from: they find the imports and tiktoken's tables ready."""

from nanogpt.prepare import shards
from nanogpt.tokenizer import gpt2

__all__ = ["shards"]

gpt2().encode("")
