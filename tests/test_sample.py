"""Sampling with a cache is sampling, past the last position too, and draws what it was told to."""

import dataclasses
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from nanogpt import command, tree
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config, Params, apply, init
from nanogpt.sample import SampleCommand, decode, draw, empty_cache, generate, text_of
from nanogpt.tokenizer import characters

TINY = GPT2Config(vocab_size=65, block_size=12, n_layer=2, n_head=2, n_embd=16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def params() -> Params:
    """Weights large enough for probabilities far from equal."""
    generator = seeded()
    fresh = init(TINY, generator)
    return tree.map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=generator), fresh)


def prompt_of(length: int, *, rows: int = 2) -> Tensor:
    return torch.randint(TINY.vocab_size, (rows, length), generator=seeded(1))


def generate_without_cache(params: Params, prompt: Tensor, *, max_new_tokens: int, **settings) -> Tensor:
    """Every token from one pass over the context, which goes on from its last half block when it is full."""
    text, first = prompt, max(prompt.shape[1] - TINY.block_size, 0)
    for _ in range(max_new_tokens):
        if text.shape[1] - first > TINY.block_size:
            first = text.shape[1] - TINY.block_size // 2
        logits = apply(params, text[:, first:], TINY)[:, -1]
        text = torch.cat([text, draw(logits, **settings)], dim=1)
    return text


@pytest.mark.parametrize("length", [1, 5, 11, 12, 13, 30])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_no_token_up_to_and_past_the_last_position(
    params: Params, length: int, temperature: float
):
    settings = dict(temperature=temperature, top_k=None, top_p=None)
    prompt, count = prompt_of(length), 3 * TINY.block_size
    cached = generate(params, TINY, prompt, max_new_tokens=count, generator=seeded(3), **settings)
    expected = generate_without_cache(params, prompt, max_new_tokens=count, generator=seeded(3), **settings)
    assert cached.shape == (2, length + count)
    assert cached.equal(expected)


def test_a_model_of_one_position_sees_the_last_token_alone():
    config = dataclasses.replace(TINY, block_size=1)
    params = init(config, seeded())
    text = generate(params, config, prompt_of(3), max_new_tokens=4, temperature=0.0)
    for t in range(2, 6):
        assert text[:, t + 1].equal(apply(params, text[:, t : t + 1], config)[:, -1].argmax(-1))


def test_ids_beyond_the_tokenizers_are_left_out_of_a_text():
    assert text_of(torch.tensor([0, 3, 1, 4, 2]), characters("abc")) == "abc"


def test_logits_of_the_cache_equal_those_of_one_pass(params: Params):
    tokens, cache = prompt_of(12), empty_cache(params, TINY, 2)
    logits = [decode(params, tokens[:, :4], 0, cache, TINY)]
    logits += [decode(params, tokens[:, t : t + 1], torch.tensor(t), cache, TINY) for t in range(4, 12)]
    # fp32 rounding of logits of about 5
    torch.testing.assert_close(
        torch.stack(logits, 1), apply(params, tokens, TINY)[:, 3:], rtol=1e-5, atol=2e-5
    )


def test_rows_of_a_batch_do_not_touch_each_other(params: Params):
    prompt = prompt_of(5, rows=3)
    together = generate(params, TINY, prompt, max_new_tokens=15, temperature=0.0)
    alone = [generate(params, TINY, row[None], max_new_tokens=15, temperature=0.0) for row in prompt]
    assert together.equal(torch.cat(alone))


def test_the_prompt_comes_first_and_no_new_tokens_is_the_prompt(params: Params):
    prompt = prompt_of(20)
    assert generate(params, TINY, prompt, max_new_tokens=4)[:, :20].equal(prompt)
    assert generate(params, TINY, prompt, max_new_tokens=0).equal(prompt)


def test_two_threads_may_share_a_config(params: Params):
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    expected = apply(params, prompt, TINY)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: apply(params, prompt, TINY), range(100)))
    assert all(map(expected.equal, found))


def test_the_same_generator_gives_the_same_text(params: Params):
    first, again, other = (
        generate(params, TINY, prompt_of(3), max_new_tokens=20, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_randomness_comes_from_the_generator_alone(params: Params):
    before = torch.random.get_rng_state()
    generate(params, TINY, prompt_of(3), max_new_tokens=5, generator=seeded())
    assert torch.random.get_rng_state().equal(before)


def test_top_1_is_greedy(params: Params):
    top_1 = generate(params, TINY, prompt_of(3), max_new_tokens=20, top_k=1, generator=seeded())
    assert top_1.equal(generate(params, TINY, prompt_of(3), max_new_tokens=20, temperature=0.0))


def test_no_token_of_the_padding_is_ever_drawn():
    fresh = init(TINY, seeded())
    # The real tokens score far below zero, which is what padded rows of the head would score.
    gloomy = fresh | {
        "wte.weight": -fresh["ln_f.weight"].expand(65, 16) * 5,
        "ln_f.bias": torch.full((16,), 1.0),
    }
    for settings in (dict(temperature=0.0), dict(temperature=100.0), dict(top_k=1000), dict(top_p=1.0)):
        text = generate(
            gloomy, TINY, prompt_of(3, rows=20), max_new_tokens=10, generator=seeded(), **settings
        )
        assert int(text.max()) < TINY.vocab_size


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def drawn_shares(count: int = 20_000, **settings) -> list[float]:
    defaults = dict(temperature=1.0, top_k=None, top_p=None, generator=seeded())
    tokens = draw(LOGITS.expand(count, 4), **(defaults | settings))
    return (tokens.flatten().bincount(minlength=4) / count).tolist()


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        (dict(), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_k=4), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=100), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_p=0.01), [1, 0, 0, 0]),
        (dict(top_p=0.6), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (dict(top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        (dict(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (dict(temperature=0.0), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_in_the_shares_that_the_settings_say(settings: dict, shares: list[float]):
    # five standard errors of a share of 20,000 are at most 0.018; what is cut away must be exactly 0
    got = drawn_shares(**settings)
    assert got == pytest.approx(shares, abs=0.018)
    assert [share == 0 for share in got] == [share == 0 for share in shares]


def test_top_p_keeps_no_token_beyond_the_one_that_reaches_p():
    tokens = draw(torch.zeros(1000, 4), temperature=1.0, top_k=None, top_p=0.5, generator=seeded())
    assert len(tokens.unique()) == 2


def test_top_k_keeps_k_tokens_even_if_others_are_as_likely():
    # In half precision logits are often equal.
    tokens = draw(torch.zeros(1000, 4), temperature=1.0, top_k=2, top_p=None, generator=seeded())
    assert len(tokens.unique()) == 2


def test_the_likeliest_token_stays_however_small_top_p_is():
    tokens = draw(LOGITS.expand(100, 4), temperature=1.0, top_k=None, top_p=1e-300, generator=seeded())
    assert tokens.unique().tolist() == [0]


def test_top_p_1_keeps_every_token(monkeypatch: pytest.MonkeyPatch):
    logits = torch.full((1, 30_000), -17.5)  # in fp32 their probabilities reach 1 before the last of them
    logits[:, 0] = 0
    drawn_from: list[Tensor] = []
    multinomial = torch.multinomial

    def spy(probabilities: Tensor, count: int, **settings: Any) -> Tensor:
        drawn_from.append(probabilities)
        return multinomial(probabilities, count, **settings)

    monkeypatch.setattr(torch, "multinomial", spy)
    draw(logits, temperature=1.0, top_k=None, top_p=1.0, generator=seeded())
    assert (drawn_from[0] > 0).all()


@pytest.mark.parametrize("order", [[3, 0, 2, 1], [1, 2, 3, 0]])
def test_top_p_keeps_the_likeliest_in_whatever_order_they_stand(order: list[int]):
    logits = LOGITS[:, order].expand(1000, 4)
    tokens = draw(logits, temperature=1.0, top_k=None, top_p=0.6, generator=seeded())
    assert set(tokens.flatten().tolist()) == {order.index(0), order.index(1)}


def test_the_help_names_the_new_line_that_a_text_begins_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["sample", "--help"])
    with pytest.raises(SystemExit):
        command.parse(SampleCommand, default=SampleCommand())
    assert "Text to go on from. (default: a new line)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens is -1 and temperature 1.0, expected numbers of at least 0"),
        (
            dict(temperature=-0.5),
            "max_new_tokens is 3 and temperature -0.5, expected numbers of at least 0",
        ),
        (
            dict(temperature=math.inf),
            "max_new_tokens is 3 and temperature inf, expected numbers of at least 0",
        ),
        (dict(top_k=0), "top_k is 0, expected at least 1; leave it out to keep every token"),
        (dict(top_p=0.0), "top_p is 0.0, expected above 0 and at most 1; leave it out to keep every token"),
        (dict(top_p=1.5), "top_p is 1.5, expected above 0 and at most 1; leave it out to keep every token"),
        (
            dict(prompt=torch.zeros(1, 0, dtype=torch.int64)),
            "the prompt has shape [1, 0], expected [B, T] with at least one token",
        ),
        (
            dict(prompt=torch.zeros(0, 3, dtype=torch.int64)),
            "the prompt has shape [0, 3], expected [B, T] with at least one token",
        ),
        (dict(prompt=torch.tensor([[3, 65]])), "the prompt has token id 65, expected ids from 0 to 64"),
        (dict(prompt=torch.tensor([[-1, 3]])), "the prompt has token id -1, expected ids from 0 to 64"),
    ],
)
def test_a_setting_out_of_range_is_refused(params: Params, settings: dict, message: str):
    settings = dict(prompt=prompt_of(3), max_new_tokens=3) | settings
    with pytest.raises(UserError) as caught:
        generate(params, TINY, **settings)
    assert str(caught.value) == message
