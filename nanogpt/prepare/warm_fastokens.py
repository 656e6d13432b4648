"""Imported by the server that workers are forked from: they find imports and fastokens' tokenizer ready."""

import gc
import importlib
import threading

from nanogpt.prepare.fast import fastokens_tokenizer, tokenizer_json

tokenizer_json()
_tokenizer = threading.Thread(target=fastokens_tokenizer)
_tokenizer.start()  # what it has left to do needs no lock of Python's

for _name in ("nanogpt.prepare.arrow", "nanogpt.prepare.build"):
    importlib.import_module(_name)
_tokenizer.join()
gc.freeze()  # no collection in a worker copies these pages
