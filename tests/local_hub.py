"""A hub of a test's own: a server that answers as the Hugging Face hub does, for one data set or model."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Repository(NamedTuple):
    """All that the hub has."""

    kind: str
    """ "datasets" or "models"."""
    name: str
    commit: str
    files: dict[str, bytes]


class Server(ThreadingHTTPServer):
    """Serves `repository`."""

    repository: Repository


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that reading the repository needs; 404 for everything else."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, name, commit, files = self.server.repository
        path = unquote(urlsplit(self.path).path).strip("/")
        address = f"{'datasets/' if kind == 'datasets' else ''}{name}/resolve/"
        about = f"api/{kind}/{name}"
        if path.startswith((f"{address}{commit}/", f"{address}main/")):
            self.send_file(path.removeprefix(address).partition("/")[2])
        elif path.startswith(f"{about}/tree/"):
            _, _, folder = path.removeprefix(f"{about}/tree/").partition("/")
            self.send_json(entries(files, folder))
        elif path == about or path.startswith(f"{about}/"):
            listed = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            self.send_json({"id": name, "sha": commit, "private": False, "gated": False, "siblings": listed})
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_file(self, path: str) -> None:
        files = self.server.repository.files
        if path not in files:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, etag = files[path], f"{list(files).index(path):040x}"
        headers = {
            "X-Repo-Commit": self.server.repository.commit,
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
        }
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


def entries(files: dict[str, bytes], folder: str) -> list[dict]:
    """What lies directly in `folder`, as the hub lists it."""
    found = {}
    for path, data in files.items():
        if not folder or path.startswith(f"{folder}/"):
            head, *rest = path[len(folder) + bool(folder) :].split("/")
            full = f"{folder}/{head}".lstrip("/")
            file = {"type": "file", "path": full, "size": len(data), "oid": "0" * 40}
            found[full] = {"type": "directory", "path": full, "oid": "0" * 40} if rest else file
    return list(found.values())


@contextlib.contextmanager
def serving(repository: Repository, *, cache: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that takes the server for the hub."""
    server = Server(("127.0.0.1", 0), Hub)
    server.repository = repository
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(cache),
        }
    finally:  # also after a test that fails: the thread would keep pytest from ending
        server.shutdown()
        server.server_close()
        thread.join()
