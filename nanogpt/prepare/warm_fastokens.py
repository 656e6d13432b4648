"""Imported by the server that workers are forked from: they find imports and fastokens' tokenizer ready."""

import gc
import threading

from nanogpt.prepare.fast import fastokens_tokenizer, tokenizer_json

tokenizer_json()
_tokenizer = threading.Thread(target=fastokens_tokenizer)
_tokenizer.start()  # what it has left to do needs no lock of Python's

from nanogpt.prepare import arrow, build  # noqa: E402  imported while the thread builds

__all__ = ["arrow", "build"]

_tokenizer.join()
gc.freeze()  # no collection in a worker copies these pages
