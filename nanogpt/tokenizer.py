"""Text to token ids and back: GPT-2's byte pairs, from a file in the package, or characters."""

import functools
import hashlib
import re
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from nanogpt.byte_pairs import mergeable_ranks, merges_file, merges_of
from nanogpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**16
"""Token files hold uint16."""
BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which is what `\\s` matches in tiktoken."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the program knows about a tokenizer: ids are below `vocab_size`, at most 65,536."""

    @property
    def name(self) -> str:
        """ "gpt2" or "char": the value of `--tokenizer`."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None:
        """The id that follows every document; None if nothing marks where a document ends."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. A literal `<|endoftext|>` in it is plain text."""
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an array of uint16, without creating a Python object for each."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are not a character, as at the ends of a cut sequence, become U+FFFD."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `tokenizer_from` needs to build the same tokenizer again, as JSON values."""
        ...


@dataclass(frozen=True, eq=False)
class BytePairs:
    """GPT-2's tokenizer, as tiktoken computes it; its tables are built when they are first needed."""

    merges: tuple[str, ...]
    """Lines of the merges file, in order."""
    sha256: str
    """Hash of that file."""
    name: str = "gpt2"

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.name,
            pat_str=r50k_pat_str,
            mergeable_ranks=mergeable_ranks(self.merges),
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    @property
    def vocab_size(self) -> int:
        return self.end_of_text + 1

    @property
    def end_of_text(self) -> int:
        return 256 + len(self.merges)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self.encode_array(without_surrogates(text))
        except ValueError:  # tiktoken backtracks over blanks before a word, but at most a million
            return np.concatenate([self._encode(piece) for piece in cut_in_blanks(text)])

    def _encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Characters:
    """One id for each character of a sorted alphabet."""

    alphabet: str
    name: str = "char"
    end_of_text: None = None

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return code_points(self.alphabet)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        points = code_points(text)
        ids = np.searchsorted(self._code_points, points).clip(max=self.vocab_size - 1)
        unknown = self._code_points[ids] != points
        if unknown.any():
            raise UserError(
                f"got the character {chr(points[unknown][0])!r}, expected one of the {self.vocab_size} of "
                f"the alphabet {self.alphabet!r}; leave it out of the text or prepare the data with it"
            )
        return ids.astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.alphabet.encode()).hexdigest()
        return {"name": self.name, "alphabet": self.alphabet, "sha256": digest}


@functools.cache
def gpt2() -> Tokenizer:
    """GPT-2's tokenizer: 50,257 ids, the last of them end of text. One instance per process."""
    file = merges_file()
    return BytePairs(tuple(merges_of(file)), hashlib.sha256(file).hexdigest())


def characters(text_or_alphabet: str) -> Tokenizer:
    """A tokenizer of the distinct characters of `text_or_alphabet`, numbered by code point.

    Raises UserError if there are none, or more than a uint16 can number.
    """
    alphabet = "".join(sorted(set(without_surrogates(text_or_alphabet))))
    if not 0 < len(alphabet) <= MAX_VOCAB_SIZE:
        raise UserError(
            f"got a text of {len(alphabet):,} distinct characters, expected 1 to {MAX_VOCAB_SIZE:,}; "
            "use --tokenizer gpt2 for such a text"
        )
    return Characters(alphabet)


def tokenizer_from(description: dict[str, Any] | None) -> Tokenizer:
    """The tokenizer that `describe` described. Raises UserError if this program has no such tokenizer."""
    match description:
        case None:
            raise UserError(
                "the model's tokens are those of no tokenizer that is here, expected GPT-2's or characters; "
                "choose another --run-dir"
            )
        case {"name": "gpt2"}:
            tokenizer = gpt2()
        case {"name": "char", "alphabet": str(alphabet)}:
            tokenizer = characters(alphabet)
        case _:
            raise UserError(
                f"got the tokenizer {description!r}, expected one named gpt2 or char; prepare the data again"
            )
    expected = description.get("sha256", tokenizer.describe()["sha256"])
    if expected != tokenizer.describe()["sha256"]:
        raise UserError(
            f"got a {tokenizer.name} tokenizer with the hash {expected}, expected "
            f"{tokenizer.describe()['sha256']}; prepare the data again with this version"
        )
    return tokenizer


def cut_in_blanks(text: str) -> list[str]:
    """`text` in pieces whose concatenated ids are those of `text`: cut where GPT-2's pattern always cuts.

    That is before the last of several blanks, which belongs to the word after it.
    """
    return re.split(f"(?<=[{BLANK}])(?=[{BLANK}][^{BLANK}])", text)


def without_surrogates(text: str) -> str:
    """`text` with surrogate pairs joined and lone ones, which JSON can smuggle in, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def code_points(text: str) -> np.ndarray:
    """Code point of each character, uint32."""
    try:
        encoded = text.encode("utf-32-le")
    except UnicodeEncodeError:
        encoded = without_surrogates(text).encode("utf-32-le")
    return np.frombuffer(encoded, dtype="<u4")
