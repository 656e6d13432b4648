"""GPT-2's tokenizer in fastokens. Cheap to import, so that it can be built while its users are imported."""

import functools
import os
from typing import Any

import orjson

from nanogpt.byte_pairs import hugging_face_tokenizer


@functools.cache
def fastokens_tokenizer() -> Any:
    """A `fastokens.Tokenizer` for one core, built once per process."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # with RAYON_NUM_THREADS=1 it would still use two
    import fastokens

    # Built from ranks and a pattern, the same tokenizer would miss the fast path for byte-level models.
    return fastokens.Tokenizer.from_json_str(tokenizer_json())


@functools.cache
def tokenizer_json() -> str:
    """What fastokens builds the tokenizer from."""
    return orjson.dumps(hugging_face_tokenizer()).decode()
