"""Tokenizers: GPT-2's known ids, exact round trips, and a sentence for each mistake."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.byte_pairs import byte_alphabet
from nanogpt.errors import UserError
from nanogpt.tokenizer import END_OF_TEXT, characters, cut_in_blanks, gpt2, tokenizer_from


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [15496, 11, 995, 0]),
        ("", []),
        ("First Citizen:\nBefore we proceed", [5962, 22307, 25, 198, 8421, 356, 5120]),
        ("the  café — 1234 's", None),
    ],
)
def test_gpt2_gives_the_ids_that_the_world_knows(text: str, ids: list[int] | None):
    encoded = gpt2().encode(text)
    assert encoded == (gpt2().encoding.encode_ordinary(text) if ids is None else ids)


def test_gpt2_knows_50257_ids_of_which_the_last_ends_a_text():
    assert (gpt2().vocab_size, gpt2().end_of_text) == (50257, 50256)
    assert gpt2().decode([50256]) == END_OF_TEXT


def test_the_alphabet_of_the_merges_names_each_byte_once():
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_a_literal_end_of_text_in_a_text_is_plain_text():
    ids = gpt2().encode(f"a{END_OF_TEXT}b")
    assert 50256 not in ids
    assert gpt2().decode(ids) == f"a{END_OF_TEXT}b"


def test_a_lone_surrogate_is_encoded_as_the_replacement_character_and_a_pair_as_its_character():
    assert gpt2().encode("a\ud800") == gpt2().encode("a\ufffd")
    assert gpt2().encode("\ud83d\ude00") == gpt2().encode("😀")
    assert characters("a\ud800").decode([1]) == "\ufffd"


def test_a_million_blanks_before_a_word_are_encoded_although_tiktoken_gives_up():
    blanks = " " * 1_000_000
    pieces = ["a", blanks, " b\ufffd", f"\n {blanks}"]
    ids = [i for piece in pieces for i in gpt2().encode(piece)]
    assert gpt2().encode(f"a {blanks}b\ud800\n {blanks}") == ids


@settings(deadline=None, max_examples=200)
@given(st.text("\t\n\x0b\x0c\r\x1c \x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000a'1."))
def test_a_text_cut_in_its_blanks_has_the_same_ids(text: str):
    pieces = cut_in_blanks(text)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in gpt2().encode(piece)] == gpt2().encode(text)


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_gpt2_decodes_what_it_encoded(text: str):
    ids = gpt2().encode_array(text)
    assert ids.dtype == np.uint16
    assert gpt2().decode(ids.tolist()) == text


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1))
def test_characters_are_numbered_by_code_point_and_decode_to_themselves(text: str):
    tokenizer = characters(text)
    assert tokenizer.encode(text) == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_array(text).dtype == np.uint16
    assert tokenizer.end_of_text is None


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(
        UserError, match=r"got the character 'é', expected one of the 3 of the alphabet 'abc'"
    ):
        characters("abc").encode("abé")


@pytest.mark.parametrize("text", ["", "".join(map(chr, range(0x10000, 0x20001)))])
def test_an_alphabet_that_is_empty_or_beyond_uint16_is_refused(text: str):
    with pytest.raises(UserError, match=r"distinct characters, expected 1 to 65,536"):
        characters(text)


@pytest.mark.parametrize("tokenizer", [gpt2(), characters("To be\n")])
def test_a_description_that_went_through_json_builds_the_same_tokenizer(tokenizer):
    again = tokenizer_from(json.loads(json.dumps(tokenizer.describe())))
    assert again.describe() == tokenizer.describe()
    assert again.encode("To be") == tokenizer.encode("To be")


def test_a_description_with_another_hash_or_name_is_refused():
    with pytest.raises(UserError, match="with the hash 12ab, expected"):
        tokenizer_from({"name": "gpt2", "sha256": "12ab"})
    with pytest.raises(UserError, match="expected one named gpt2 or char"):
        tokenizer_from({"name": "llama"})
    with pytest.raises(UserError, match=r"^the model's tokens are those of no tokenizer that is here, expec"):
        tokenizer_from(None)
