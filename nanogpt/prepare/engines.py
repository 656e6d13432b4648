"""What turns documents into ids: tiktoken, the reference, or fastokens if it is installed and agrees."""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nanogpt.prepare.fast import fastokens_tokenizer
from nanogpt.tokenizer import Tokenizer, tokenizer_from, without_surrogates

SAMPLE_FRACTION = 0.002
"""Fraction of each batch's characters that tiktoken encodes again as a check."""
FIRST_CHARACTERS = 1 << 17
"""How many characters of the first batch it encodes again, at least."""

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Maps texts to their concatenated ids (uint16) and the number of ids of each (int64)."""


class Sample(NamedTuple):
    """Texts of the input and what a faster tokenizer made of them, for tiktoken to check."""

    texts: list[str]
    ids: np.ndarray
    lengths: np.ndarray


class EnginesDifferError(Exception):
    """A faster tokenizer gave other ids than tiktoken, or none: the run has to start over with tiktoken."""


def encoder(engine: str, tokenizer: str) -> Encode:
    """The engine's function for the tokenizer described by the JSON `tokenizer`."""
    if engine == "tiktoken":
        return functools.partial(encode_each, tokenizer_from(json.loads(tokenizer)))
    return fastokens_encoder()


def encode_each(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The reference: each text by itself."""
    ids = [tokenizer.encode_array(text) for text in texts]
    return np.concatenate([np.empty(0, np.uint16), *ids]), np.array([part.size for part in ids], np.int64)


def sample_of(texts: Sequence[str], turn: int) -> list[str]:
    """The part of a batch that tiktoken encodes as well: of the first (`turn` 0), its first documents whole.

    Of every other batch, a piece of one text with SAMPLE_FRACTION of the batch's characters; `turn` selects
    the text and the place in it.
    """
    size = max(1, int(sum(map(len, texts)) * SAMPLE_FRACTION))
    if turn == 0:
        before = itertools.accumulate(map(len, texts), initial=0)
        return [text for text, start in zip(texts, before, strict=False) if start < FIRST_CHARACTERS]
    text = texts[turn % len(texts)]
    start = turn * size % max(1, len(text) - size)
    return [text[start : start + size]]


def check_sample(sample: Sample, reference: Tokenizer) -> None:
    """Raises EnginesDifferError if the sample's ids are not those of the reference."""
    ids, lengths = encode_each(reference, sample.texts)
    if not (np.array_equal(ids, sample.ids) and np.array_equal(lengths, sample.lengths)):
        raise EnginesDifferError("other ids for the same text")


def fastokens_encoder() -> Encode:
    """fastokens, called in the way that is fastest from Python."""
    fast = fastokens_tokenizer()

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = fast.encode_batch_flat(list(texts))
        except UnicodeEncodeError:
            ids, offsets = fast.encode_batch_flat([without_surrogates(text) for text in texts])
        except (ValueError, RuntimeError) as error:  # a limit that the reference does not have
            raise EnginesDifferError(str(error)) from error
        lengths = np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))
        return np.frombuffer(ids, np.uint32).astype(np.uint16), lengths

    return encode
