"""GPT-2's tokenizer in fastokens. Light to import, so that it is built beside the imports of what uses it."""

import functools
import os
from typing import Any

import orjson

from nanogpt.byte_pairs import byte_alphabet, merges_file, merges_of


@functools.cache
def fastokens_tokenizer() -> Any:
    """A `fastokens.Tokenizer` for one core; built once in a process."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # RAYON_NUM_THREADS of 1 leaves it two
    import fastokens

    # As ranks and a pattern, the same tokenizer would miss the fast path for byte-level models.
    return fastokens.Tokenizer.from_json_str(tokenizer_json())


@functools.cache
def tokenizer_json() -> str:
    """GPT-2's tokenizer in the format of Hugging Face's `tokenizer.json`, without its special token."""
    merges = merges_of(merges_file())
    vocab = [*byte_alphabet(), *"\n".join(merges).replace(" ", "").split("\n")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(vocab)},
        "merges": merges,
    }
    steps = {"normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level}
    extent = {"truncation": None, "padding": None, "added_tokens": []}
    return orjson.dumps({"version": "1.0", **extent, **steps, "model": model}).decode()
