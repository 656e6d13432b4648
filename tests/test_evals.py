"""Validation loss is the mean over tokens, whatever the batches they come in."""

import numpy as np
import pytest
import torch

from nanogpt.data import Batch
from nanogpt.evals import validation_batches, validation_loss
from nanogpt.loss import next_token_loss
from nanogpt.model import GPT2Config, Params, apply, init
from nanogpt.train import make_eval_step

T = 8
TINY = GPT2Config(vocab_size=65, block_size=T, n_layer=1, n_head=2, n_embd=16)
TOKENS = np.random.default_rng(0).integers(65, size=203).astype(np.uint16)  # 25 windows and a rest


@pytest.fixture(scope="module")
def params() -> Params:
    return init(TINY, torch.Generator().manual_seed(0))


def batches_of(tokens: np.ndarray, *, token_count: int, batch_size: int) -> list[Batch]:
    device = torch.device("cpu")
    return list(
        validation_batches(
            tokens, token_count=token_count, batch_size=batch_size, block_size=T, device=device
        )
    )


def loss_of(params: Params, tokens: np.ndarray, *, token_count: int, batch_size: int) -> float:
    eval_step = make_eval_step(TINY, precision="float32", compile=False)
    batches = batches_of(tokens, token_count=token_count, batch_size=batch_size)
    return validation_loss(eval_step, params, iter(batches))


def plain_loss(params: Params, windows: int) -> float:
    text = torch.from_numpy(TOKENS.astype(np.int64))
    inputs, targets = (text[s : s + windows * T].view(windows, T) for s in (0, 1))
    return float(next_token_loss(apply(params, inputs, TINY), targets))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 100])
def test_the_loss_is_that_of_a_plain_computation_for_every_batch_size(params: Params, batch_size: int):
    # fp32 rounding; a filled-up row that counted, or a window left out, would change the third digit
    assert loss_of(params, TOKENS, token_count=12 * T, batch_size=batch_size) == pytest.approx(
        plain_loss(params, 12), rel=1e-6
    )


def test_more_tokens_than_there_are_take_the_whole_text(params: Params):
    assert loss_of(params, TOKENS, token_count=10**9, batch_size=4) == pytest.approx(
        plain_loss(params, 25), rel=1e-6
    )  # fp32 rounding


def test_a_text_of_one_window_is_evaluated(params: Params):
    assert loss_of(params, TOKENS[: T + 1], token_count=10**9, batch_size=4) == pytest.approx(
        plain_loss(params, 1), rel=1e-6
    )  # fp32 rounding


def test_fewer_tokens_than_a_window_still_take_one(params: Params):
    assert loss_of(params, TOKENS, token_count=1, batch_size=4) == pytest.approx(
        plain_loss(params, 1), rel=1e-6
    )


def test_a_text_without_a_window_has_no_batches():
    assert batches_of(TOKENS[:T], token_count=10**9, batch_size=4) == []


@pytest.mark.parametrize("windows", [1, 4, 5])
def test_all_batches_have_one_shape_so_that_one_compilation_serves(windows: int):
    batches = batches_of(TOKENS, token_count=windows * T, batch_size=4)
    assert {tuple(part.shape) for batch in batches for part in batch} == {(1, 4, T)}
    assert sum(int((batch.targets != -100).sum()) for batch in batches) == windows * T
