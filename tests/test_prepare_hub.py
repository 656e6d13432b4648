"""Data sets of the hub, from a hub of this test's own."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import pytest
from local_hub import Repository, serving

from nanogpt.prepare.check import verify
from nanogpt.prepare.manifest import read_manifest
from nanogpt.prepare.sources import HUB_SHORTHANDS
from nanogpt.tokenizer import gpt2

NAME, COMMIT = HUB_SHORTHANDS["openwebtext"]
CARD = b"""---
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/*
---
"""
DOCUMENTS = [f"document {i} of some words" for i in range(600)]


def parquet(documents: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), file, row_group_size=100)
    return file.getvalue()


FILES = {
    "README.md": CARD,
    "plain_text/train-00000-of-00002.parquet": parquet(DOCUMENTS[:300]),
    "plain_text/train-00001-of-00002.parquet": parquet(DOCUMENTS[300:]),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process that takes our server for the hub."""
    repository = Repository("datasets", NAME, COMMIT, FILES)
    with serving(repository, cache=tmp_path_factory.mktemp("hub")) as settings:
        yield os.environ | settings


def prepare(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanogpt.prepare", *map(str, arguments), "--workers", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("flags", [[], ["--cached"]], ids=["streamed", "cached"])
def test_openwebtext_comes_from_its_commit_as_documents_in_order(flags, environment, tmp_path):
    done = prepare(environment, "openwebtext", "--out", tmp_path / "out", "--val-fraction", 0, *flags)
    assert done.returncode == 0, done.stderr
    assert (read_manifest(tmp_path / "out").source, read_manifest(tmp_path / "out").revision) == (
        NAME,
        COMMIT,
    )
    verify(tmp_path / "out")
    ids = [i for text in DOCUMENTS for i in [*gpt2().encode(text), 50256]]
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["openwebtext", "--split", "test"],
            f"error: {NAME} has the splits train, expected 'test'; set --split",
        ),
        (["openwebtext", "--config", "tiny"], f"error: cannot use {NAME} (BuilderConfig 'tiny' not found"),
        (["nobody/nothing"], "error: you can read no data set 'nobody/nothing' at revision 'main' ("),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(arguments, message, environment, tmp_path):
    done = prepare(environment, *arguments, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
