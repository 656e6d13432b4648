"""Imported by the server that workers are forked from: they find imports and tiktoken's tables ready."""

import gc
import importlib

from nanogpt.tokenizer import gpt2

importlib.import_module("nanogpt.prepare.build")
gpt2().encode("")
gc.freeze()  # no collection in a worker copies these pages
