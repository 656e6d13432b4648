"""Data sets of the hub, from a hub of this test's own: a server that answers as the Hugging Face hub does."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

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


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that reading NAME at COMMIT needs; 404 for everything else."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case ["datasets", owner, name, "resolve", commit, *path] if (f"{owner}/{name}", commit) == (
                NAME,
                COMMIT,
            ):
                self.send_file("/".join(path))
            case ["api", "datasets", owner, name, "tree", _, *path] if f"{owner}/{name}" == NAME:
                self.send_json(entries("/".join(path)))
            case ["api", "datasets", owner, name, *_] if f"{owner}/{name}" == NAME:
                files = [{"rfilename": path, "size": len(data)} for path, data in FILES.items()]
                self.send_json(
                    {"id": NAME, "sha": COMMIT, "private": False, "gated": False, "siblings": files}
                )
            case _:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_file(self, path: str) -> None:
        if path not in FILES:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, etag = FILES[path], f"{list(FILES).index(path):040x}"
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self.send(200, data, headers)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        stop = min(int(last or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
        self.send(206, data[int(first) : stop], headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""


def entries(folder: str) -> list[dict]:
    """What lies directly in `folder`, as the hub lists it."""
    found = {}
    for path, data in FILES.items():
        if not folder or path.startswith(f"{folder}/"):
            head, *rest = path[len(folder) + bool(folder) :].split("/")
            full = f"{folder}/{head}".lstrip("/")
            file = {"type": "file", "path": full, "size": len(data), "oid": "0" * 40}
            found[full] = {"type": "directory", "path": full, "oid": "0" * 40} if rest else file
    return list(found.values())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process that takes our server for the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
    }
    yield os.environ | settings
    server.shutdown()
    server.server_close()
    thread.join()


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
