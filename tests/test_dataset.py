"""The data folder of a run: which one it is, and what its ids stand for."""

from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_tokens

from nanogpt.config import DataConfig, RunConfig, SampleConfig
from nanogpt.dataset import Dataset, open_dataset
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config


def opened(path: Path | str | None, *, vocab_size: int = 50257, prompt: str = "A") -> Dataset:
    model = GPT2Config(vocab_size=vocab_size, block_size=16)
    data = DataConfig(path=None if path is None else str(path))
    return open_dataset(RunConfig(model=model, data=data, sample=SampleConfig(prompt=prompt)))


def test_a_folder_of_nanogpt_has_gpt2s_tokens_if_the_model_has_as_many(tmp_path: Path) -> None:
    write_tokens(tmp_path, np.arange(400) % 32)
    (tmp_path / "manifest.json").unlink()
    dataset = opened(tmp_path)
    assert dataset.tokenizer is not None
    assert (dataset.tokenizer.name, dataset.note, dataset.sha256) == ("gpt2", "", None)
    assert opened(tmp_path, vocab_size=32).tokenizer is None


def test_a_manifest_says_what_ids_stand_for_whatever_the_models_size(tmp_path: Path) -> None:
    write_tokens(tmp_path, np.arange(400) % 32)
    dataset = opened(tmp_path)
    assert dataset.tokenizer is not None
    assert dataset.tokenizer.name == "char"


def test_openwebtext_is_the_default_where_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_tokens(tmp_path / "data/openwebtext", np.arange(400) % 32)
    dataset = opened(None)
    assert (dataset.folder, dataset.note) == (Path("data/openwebtext"), "")


def test_a_folder_called_shakespeare_is_meant_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / "shakespeare", np.arange(400) % 32)
    assert opened("shakespeare").folder == Path("shakespeare")


def test_both_files_are_in_the_hash(tmp_path: Path) -> None:
    hashes = set()
    for name in ("", "train", "val"):
        write_tokens(tmp_path / "data", np.arange(400) % 32)
        if name:
            np.zeros(400, "<u2").tofile(tmp_path / f"data/{name}.bin")
        hashes.add(opened(tmp_path / "data").hash)
    assert len(hashes) == 3


def test_every_id_of_the_prompt_is_one_of_the_models(tmp_path: Path) -> None:
    write_tokens(tmp_path, np.arange(400) % 26)
    assert opened(tmp_path, vocab_size=27, prompt="AZ").tokenizer is not None
    with pytest.raises(
        UserError, match=r"the prompt 'AZ' has the token ids \[1, 26\], expected at least one"
    ):
        opened(tmp_path, vocab_size=26, prompt="AZ")
