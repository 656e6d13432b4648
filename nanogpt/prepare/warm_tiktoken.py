"""Imported by the server that workers are forked from, so that imports and tiktoken's tables are ready."""

import gc
import importlib

from nanogpt.tokenizer import gpt2

importlib.import_module("nanogpt.prepare.build")
gpt2().encode("")
gc.freeze()  # so that no garbage collection in a worker copies these pages
