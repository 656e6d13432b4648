"""GPT-2's byte pairs, from the package's own file. Cheap to import, so that `prepare` can begin with them."""

from collections.abc import Sequence
from importlib import resources
from typing import Any


def merges_file() -> bytes:
    """OpenAI's `vocab.bpe`."""
    return resources.files("nanogpt").joinpath("assets/vocab.bpe").read_bytes()


def merges_of(file: bytes) -> list[str]:
    """The merges in order: two tokens separated by a blank. Leaves out the file's first line, its version."""
    return file.decode().strip().split("\n")[1:]


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of the merges file stands for, in the order of GPT-2's ids 0 to 255.

    Printable bytes of Latin-1 are written as themselves; the rest, in order, as the code points from 256 on.
    Source: Radford et al. 2019, section 2.2, and the code published with it.
    """
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def mergeable_ranks(merges: Sequence[str]) -> dict[bytes, int]:
    """The id of each token by its bytes: the 256 single bytes, then merge i with id 256 + i."""
    byte_of = byte_alphabet()
    apart = "\u0100"  # separates merges: outside Latin-1, so no byte is translated to it
    table = str.maketrans({**byte_of, " ": None, "\n": apart})
    tokens = "\n".join([*byte_of, *merges]).translate(table).split(apart)
    return {token.encode("latin-1"): i for i, token in enumerate(tokens)}


def hugging_face_tokenizer() -> dict[str, Any]:
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
    return {"version": "1.0", **extent, **steps, "model": model}
