"""Imported by the server that workers are forked from: they find imports and fastokens' tokenizer ready."""

from nanogpt.prepare import build
from nanogpt.prepare.engines import fastokens_encoder

__all__ = ["build"]

fastokens_encoder()
