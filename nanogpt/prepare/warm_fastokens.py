"""Imported by the server that workers are forked from: they find imports and fastokens' tokenizer ready."""

import threading

from nanogpt.prepare.engines import fastokens_encoder, tokenizer_json

tokenizer_json()
_tokenizer = threading.Thread(target=fastokens_encoder)
_tokenizer.start()  # what is left to do needs no Python

from nanogpt.prepare import arrow, build  # noqa: E402  see above

__all__ = ["arrow", "build"]

_tokenizer.join()
