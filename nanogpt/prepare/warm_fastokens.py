"""Imported by the server that workers are forked from, so that imports and fastokens' tokenizer are ready."""

import gc
import importlib
import threading

from nanogpt.prepare.fast import fastokens_tokenizer, tokenizer_json

tokenizer_json()
_tokenizer = threading.Thread(target=fastokens_tokenizer)
_tokenizer.start()  # the rest of its work does not need the GIL

for _name in ("nanogpt.prepare.arrow", "nanogpt.prepare.build"):
    importlib.import_module(_name)
_tokenizer.join()
gc.freeze()  # so that no garbage collection in a worker copies these pages
