"""GPT-2's tokenizer in fastokens. Light to import, so that it is built beside the imports of what uses it."""

import functools
import os
from typing import Any

import orjson

from nanogpt.byte_pairs import hugging_face_tokenizer


@functools.cache
def fastokens_tokenizer() -> Any:
    """A `fastokens.Tokenizer` for one core; built once in a process."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # RAYON_NUM_THREADS of 1 leaves it two
    import fastokens

    # As ranks and a pattern, the same tokenizer would miss the fast path for byte-level models.
    return fastokens.Tokenizer.from_json_str(tokenizer_json())


@functools.cache
def tokenizer_json() -> str:
    """What fastokens builds the tokenizer from."""
    return orjson.dumps(hugging_face_tokenizer()).decode()
