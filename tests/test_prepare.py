"""Prepare: equal to a plain loop for any source, workers and kills; a sentence for each mistake."""

import contextlib
import errno
import fcntl
import gzip
import io
import json
import lzma
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken

from nanogpt import __version__
from nanogpt.errors import UserError
from nanogpt.prepare import arrow, check, sources
from nanogpt.prepare.__main__ import main, parse
from nanogpt.prepare.build import TokenFile, ids_where, validation_mask
from nanogpt.prepare.bundled import bundled_text, ensure_bundled
from nanogpt.prepare.config import SPLIT_FRACTION, SPLIT_SEED
from nanogpt.prepare.engines import (
    FIRST_CHARACTERS,
    SAMPLE_FRACTION,
    EnginesDifferError,
    Sample,
    check_sample,
    encode_each,
    fastokens_encoder,
    sample_of,
)
from nanogpt.prepare.journal import open_journal
from nanogpt.prepare.manifest import read_manifest
from nanogpt.prepare.progress import Progress
from nanogpt.prepare.readers import Document, Part, open_stream
from nanogpt.prepare.shards import Job, Record, encode_shard
from nanogpt.tokenizer import characters, gpt2
from nanogpt.units import format_seconds

FRACTION, SEED = 0.01, 7
SMALL_PARTS = 20_000


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Speeches out of the bundled plays, some with what a tokenizer may stumble over."""
    speeches = bundled_text()[:150_000].split("\n\n")
    odd = ["<|endoftext|> as text", "café 😀 \u2028 \x00 naïve", " " * 300, "\n\n\n", '\\ud800 "quoted"']
    return [*speeches, *odd]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a text is cut into several parts."""
    monkeypatch.setattr(sources, "PART_BYTES", SMALL_PARTS)


def write_json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


def plain_loop(documents: list[str]) -> dict[str, bytes]:
    """The files as a few lines of tiktoken and `datasets` make them."""
    encoding: tiktoken.Encoding = gpt2().encoding
    rows = datasets.Dataset.from_dict({"i": range(len(documents))})
    val = set(rows.train_test_split(test_size=FRACTION, seed=SEED, shuffle=True)["test"]["i"])
    ids: dict[str, list[int]] = {"train.bin": [], "val.bin": []}
    for i, text in enumerate(documents):
        ids["val.bin" if i in val else "train.bin"] += [*encoding.encode_ordinary(text), 50256]
    return {name: np.array(values, "<u2").tobytes() for name, values in ids.items()}


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def prepared(source: object, out: Path, *flags: object) -> dict[str, bytes]:
    split = ("--val-fraction", FRACTION, "--split-seed", SEED)
    assert run(source, "--out", out, *split, "--workers", 2, "--engine", "tiktoken", *flags) == 0
    assert not (out / ".prepare").exists()
    return files_of(out)


def files_of(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("train.bin", "val.bin")}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints about a mistake, which is one line and no traceback."""
    assert run(arguments[0], "--engine", "tiktoken", *arguments[1:]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_files_equal_a_plain_tiktoken_loop_for_any_number_of_workers(workers, documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    assert prepared(source, tmp_path / "out", "--workers", workers) == plain_loop(documents)


def test_a_system_without_the_calls_of_linux_gives_the_same_files(documents, tmp_path, monkeypatch):
    for name in ("sched_getaffinity", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    split = ("--val-fraction", FRACTION, "--split-seed", SEED)
    assert run(source, "--out", tmp_path / "out", *split, "--engine", "tiktoken") == 0
    assert files_of(tmp_path / "out") == plain_loop(documents)


def test_the_fastest_tokenizer_that_is_installed_gives_the_same_files(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    assert prepared(source, tmp_path / "out", "--engine", "auto") == plain_loop(documents)


@pytest.mark.parametrize("count", [2, 3, 100, 1999, 2000, 2001])
def test_validation_documents_are_those_that_datasets_draws(count: int):
    rows = datasets.Dataset.from_dict({"i": range(count)})
    expected = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["i"]
    mask = validation_mask(count, fraction=0.0005, seed=2357)
    assert np.flatnonzero(mask).tolist() == sorted(expected)


def test_the_ids_of_some_documents_are_those_that_a_mask_of_tokens_would_choose():
    rng = np.random.default_rng(0)
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        lengths = rng.integers(0, 9, 200).astype(np.uint32)
        ids = rng.integers(0, 50_257, lengths.sum()).astype(np.uint16)
        wanted = rng.random(200) < fraction
        chosen = ids_where(ids, lengths, wanted)
        assert chosen.dtype == np.uint16
        np.testing.assert_array_equal(chosen, ids[np.repeat(wanted, lengths)])


def test_what_the_disk_says_to_an_early_flush_is_not_lost(tmp_path, monkeypatch):
    """It says so once: the flush at the end succeeds."""

    def fails_once(file: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails_once, raising=False)  # macOS has none
    with ThreadPoolExecutor(1) as helpers:
        file = TokenFile(tmp_path / "partial", helpers)
        file.append(np.zeros(4, np.uint16), 1)
        helpers.submit(int).result()  # the flush has ended
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            file.append(np.zeros(4, np.uint16), 1)
        file._file.close()


def test_openwebtext_would_have_the_4007_validation_documents_that_the_field_knows():
    mask = validation_mask(8_013_769, fraction=SPLIT_FRACTION, seed=SPLIT_SEED)
    assert mask.sum() == 4_007


def compressed(path: Path, suffix: str) -> Path:
    """`path` with the same bytes, compressed as `suffix` says."""
    target = path.with_name(path.name + suffix)
    data = path.read_bytes()
    if suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(target), "zstd") as file:
            file.write(data)
    else:
        target.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}[suffix](data))
    return target


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_json_lines_give_the_same_files(suffix, documents, tmp_path):
    plain = write_json_lines(tmp_path / "a.jsonl", documents)
    assert prepared(compressed(plain, suffix), tmp_path / "out") == plain_loop(documents)


def test_parquet_gives_the_same_files(documents, tmp_path):
    table = pyarrow.table({"body": documents, "id": list(range(len(documents)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    assert prepared(tmp_path / "a.parquet", tmp_path / "out", "--text-column", "body") == plain_loop(
        documents
    )


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.parquet"), "file:a.parquet", "~/a.parquet"])
def test_parquet_may_have_any_name(name, documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    Path("~").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), "written")
    Path("written").rename(name)
    assert prepared(name, tmp_path / "out") == plain_loop(documents)


def test_a_folder_of_files_gives_the_files_of_their_documents_in_the_order_of_their_names(
    documents, tmp_path
):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_json_lines(tmp_path / "in" / "b.jsonl", documents[:300])
    compressed(write_json_lines(tmp_path / "in" / "deep" / "a.jsonl", documents[300:]), ".gz")
    (tmp_path / "in" / "deep" / "a.jsonl").unlink()
    (tmp_path / "in" / "README.md").write_text("not data")
    assert prepared(tmp_path / "in", tmp_path / "out") == plain_loop(documents)


def test_a_folder_of_texts_gives_a_document_a_file(documents, tmp_path):
    (tmp_path / "in").mkdir()
    texts = documents[:60]
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i:03}.txt").write_bytes(text.encode())
    assert prepared(tmp_path / "in", tmp_path / "out") == plain_loop(texts)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n%%\n"])
def test_texts_between_separators_are_documents(line_end, end, documents, tmp_path):
    data = ("\n%%\n".join(documents) + end).replace("\n", line_end).encode()
    (tmp_path / "a.txt").write_bytes(data)
    documents = [text.replace("\n", line_end) for text in documents]
    assert prepared(tmp_path / "a.txt", tmp_path / "out", "--separator", "%%") == plain_loop(documents)


class ByteByByte(io.RawIOBase):
    """A pipe into which a slow program writes."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._data.readinto(memoryview(buffer)[:1])


@pytest.mark.parametrize("raw", [io.BytesIO, ByteByByte])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b"\r\n \n"])
def test_standard_input_gives_the_same_files(raw, begin, documents, tmp_path, monkeypatch):
    data = begin + write_json_lines(tmp_path / "a.jsonl", documents[:300]).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(raw(data))))
    assert prepared("-", tmp_path / "out") == plain_loop(documents[:300])


@pytest.mark.parametrize("raw", [io.BytesIO, ByteByByte])
@pytest.mark.parametrize("text", ["\n\n To be", "To be {", "\n"])
def test_a_text_piped_in_is_taken_from_its_first_character_on(raw, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(raw(text.encode()))))
    assert run("-", "--out", tmp_path / "out", "--val-fraction", 0) == 0
    ids = np.array([*gpt2().encode(text), 50256], "<u2")
    assert (tmp_path / "out" / "train.bin").read_bytes() == ids.tobytes()


def test_a_single_text_validates_on_its_end(tmp_path):
    text = bundled_text()[:10_000]
    (tmp_path / "a.txt").write_text(text)
    assert run(tmp_path / "a.txt", "--out", tmp_path / "out") == 0
    halves = [np.array([*gpt2().encode(part), 50256], "<u2").tobytes() for part in (text[:9000], text[9000:])]
    assert list(files_of(tmp_path / "out").values()) == halves


def test_the_first_documents_are_enough_where_there_is_a_limit(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    with source.open("a") as file:
        file.write("broken\n")
    assert prepared(source, tmp_path / "out", "--limit", 333) == plain_loop(documents[:333])


def test_characters_follow_each_other_without_an_end_of_text(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    files = prepared(source, tmp_path / "out", "--tokenizer", "char", "--val-fraction", 0)
    ids = characters("".join(documents)).encode("".join(documents))
    assert files == {"train.bin": np.array(ids, "<u2").tobytes(), "val.bin": b""}
    assert run("verify", tmp_path / "out") == 0


def test_halves_of_surrogate_pairs_in_two_documents_are_no_characters_of_the_alphabet(tmp_path):
    """In a set they stand in an order that varies from process to process, and some side by side."""
    halves = [f'{{"text": "a\\u{half:04x}"}}\n' for half in range(0xDBF0, 0xDC10)]
    (tmp_path / "a.jsonl").write_text("".join(halves))
    files = prepared(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", "char", "--val-fraction", 0)
    assert read_manifest(tmp_path / "out").tokenizer["alphabet"] == "a\ufffd"
    assert files["train.bin"] == np.array([0, 1] * len(halves), "<u2").tobytes()


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_the_bundled_text_is_prepared_once_and_as_the_command_prepares_it(name: str, tmp_path):
    folder = ensure_bundled(name)
    before = (folder / "train.bin").stat().st_mtime_ns
    assert ensure_bundled(name) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == before
    assert run("shakespeare", "--out", tmp_path / "out", "--tokenizer", name) == 0
    assert files_of(tmp_path / "out") == files_of(folder)
    assert check.verify(folder).tokens == read_manifest(tmp_path / "out").tokens


def test_a_truncated_cache_of_the_bundled_text_is_made_again():
    folder = ensure_bundled("char")
    whole = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(whole[:100])
    assert (ensure_bundled("char") / "val.bin").read_bytes() == whole


COMMAND = """
import sys
from nanogpt.prepare import sources
from nanogpt.prepare.__main__ import main
sources.PART_BYTES = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def started(*arguments: object, **settings) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, str(SMALL_PARTS), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **settings)


def test_a_run_killed_at_random_moments_ends_with_the_same_files(documents, tmp_path):
    documents = documents * 3
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    arguments = (source, "--out", tmp_path / "out", "--val-fraction", FRACTION, "--split-seed", SEED)
    journal = journal_of(tmp_path / "out")
    draw = random.Random(0)
    finished: list[int] = []
    for _ in range(2):
        process = started(*arguments, "--workers", 2)
        deadline = time.monotonic() + 60
        enough = draw.randint(1, 4) + (finished[-1] if finished else 0)
        while process.poll() is None and time.monotonic() < deadline and lines_in(journal) < enough:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        finished.append(lines_in(journal))
    assert 0 < finished[0] < finished[-1]
    assert prepared(source, tmp_path / "out") == plain_loop(documents)


@pytest.mark.parametrize("moment", ["start", "middle"])
def test_ctrl_c_ends_a_run_at_once_and_leaves_no_process(moment: str, documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents * 30)
    process = started(source, "--out", tmp_path / "out", "--engine", "tiktoken", start_new_session=True)
    while process.poll() is None and moment == "start" and not servers_of(process):
        time.sleep(0.002)
    while process.poll() is None and moment == "middle" and lines_in(journal_of(tmp_path / "out")) < 2:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; the same command continues where it was"
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and processes_of_session(process.pid):
        time.sleep(0.01)
    assert processes_of_session(process.pid) == []


def test_ctrl_c_is_one_line_from_the_first_moment(monkeypatch, capsys):
    class Interrupted(io.TextIOWrapper):
        def reconfigure(self, **settings: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Interrupted(io.BytesIO()))
    assert main(["verify", "nowhere"]) == 130
    assert capsys.readouterr().err == "stopped; the same command continues where it was\n"


def processes_of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_a_server_of_workers_that_is_killed_is_one_sentence(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents * 30)
    process = started(source, "--out", tmp_path / "out", "--engine", "tiktoken", start_new_session=True)
    while process.poll() is None and len(servers_of(process)) < 2:  # with a worker, which looks like it
        time.sleep(0.002)
    os.kill(min(servers_of(process)), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(
        "error: a worker process was killed, perhaps for want of memory"
    )
    assert "Traceback" not in errors


def servers_of(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid in processes_of_session(process.pid) if "forkserver" in command_line(pid)]


def command_line(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def journal_of(out: Path) -> Path:
    return out / ".prepare" / "records.jsonl"


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_finished_folder_is_left_as_it_is(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    before = prepared(source, tmp_path / "out")
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())]
    assert prepared(source, tmp_path / "out", "--workers", 1) == before
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").iterdir())] == times


@pytest.mark.parametrize("out", ["tokens", ".", "..", "tokens/deep"])
def test_the_folder_for_the_files_may_lie_in_the_source(out: str, documents, tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "in" / out
    source.mkdir()
    write_json_lines(source / "a.jsonl", documents)
    (source / "b.jsonl").write_text("{broken\n")
    for _ in range(2):
        assert "b.jsonl line 1 is not JSON" in error_of(capsys, source, "--out", target)
    prepared(source, target, "--skip-bad")
    before = (target / "manifest.json").stat().st_mtime_ns
    assert prepared(source, target, "--skip-bad") == plain_loop(documents)
    assert (target / "manifest.json").stat().st_mtime_ns == before
    said = capsys.readouterr().err
    assert "warning: " not in said  # as of a source that has changed
    assert "left out of" not in said  # as of files of other kinds


def test_a_manifest_names_the_programs_version_which_a_finished_folder_outlives(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    files = prepared(source, tmp_path / "out")
    assert read_manifest(tmp_path / "out").settings["program"] == __version__
    edit_manifest(tmp_path / "out", lambda manifest: manifest["settings"].update(program="0.0.1"))
    assert prepared(source, tmp_path / "out") == files


@pytest.fixture
def broken_at_the_end(documents, tmp_path) -> Path:
    """JSON lines of which the last is broken, so that a run stops after its first shards are finished."""
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    source.write_text(source.read_text() + "{broken\n")
    assert run(source, "--out", tmp_path / "out", "--workers", 1) == 2
    return source


def test_a_restart_makes_what_is_missing_or_damaged_and_nothing_else(broken_at_the_end, tmp_path):
    folder = tmp_path / "out" / ".prepare"
    first, second, third = sorted(folder.glob("*.shard"))[:3]
    first.write_bytes(b"other bytes")
    second.unlink()
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"index": 9')
    kept = third.stat().st_mtime_ns
    assert run(broken_at_the_end, "--out", tmp_path / "out", "--workers", 1) == 2
    assert first.stat().st_size > 100
    assert second.exists()
    assert third.stat().st_mtime_ns == kept


def test_documents_that_are_bad_can_be_skipped_after_all(broken_at_the_end, documents, tmp_path):
    with journal_of(tmp_path / "out").open("a") as file:
        file.write("no record\n")
    assert prepared(broken_at_the_end, tmp_path / "out", "--skip-bad") == plain_loop(documents)
    assert read_manifest(tmp_path / "out").skipped == {"broken JSON": 1}


def test_shards_without_bad_documents_are_kept_when_bad_ones_are_to_be_skipped(broken_at_the_end, tmp_path):
    *shards, _ = sorted((tmp_path / "out" / ".prepare").glob("*.shard"))  # the last ends at the bad line
    settings = json.loads((tmp_path / "out" / ".prepare" / "job.json").read_text())["settings"]
    shards[0].unlink()
    stale = shards[0].with_name("000099.12345")
    stale.write_bytes(b"what a killed process left")
    with open_journal(tmp_path / "out", settings, engine="tiktoken", restartable=True) as journal:
        assert sorted(journal.records) == list(range(1, len(shards)))
        assert not stale.exists()


def test_a_source_that_was_mended_is_done_again_loudly(broken_at_the_end, documents, tmp_path, capsys):
    write_json_lines(broken_at_the_end, documents)
    assert prepared(broken_at_the_end, tmp_path / "out") == plain_loop(documents)
    assert (
        "warning: the source has changed since this run began; all is done again" in capsys.readouterr().err
    )


def test_another_column_may_be_named_after_the_first_was_missing(documents, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"Body Text": text}) + "\n" for text in documents))
    assert "has Body Text, expected 'text'" in error_of(capsys, path, "--out", tmp_path / "out")
    assert prepared(path, tmp_path / "out", "--text-column", "Body Text") == plain_loop(documents)


def test_a_run_that_has_made_nothing_leaves_nothing(tmp_path, capsys):
    """Else the next one, whose flags are right, would be told of an unfinished run with other settings."""
    source, out = write_json_lines(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"
    for flags in ([], ["--skip-bad"]):
        error_of(capsys, source, "--out", out, "--text-column", "tetx", *flags)
        assert list(out.iterdir()) == []
    assert prepared(source, out) == plain_loop(["one", "two"])


def test_what_was_piped_in_and_cannot_be_continued_leaves_nothing(documents, tmp_path, capsys, monkeypatch):
    data = write_json_lines(tmp_path / "a.jsonl", documents).read_bytes() + b"{broken\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    assert "is not JSON" in error_of(capsys, "-", "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_documents_at_all_are_one_sentence_with_what_was_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BAD_LINES))
    message = error_of(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--skip-bad")
    assert "a.jsonl has no documents (left out: 3 broken JSON, 1 empty, 1 missing column" in message


def test_an_unfinished_run_is_not_continued_with_other_settings(broken_at_the_end, tmp_path, capsys):
    message = error_of(capsys, broken_at_the_end, "--out", tmp_path / "out", "--text-column", "body")
    assert "holds an unfinished run with other settings (text_column 'text', now 'body')" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": {}, "engine": "tiktoken"}'])
def test_a_job_that_no_run_wrote_is_one_sentence(text, broken_at_the_end, tmp_path, capsys):
    (tmp_path / "out" / ".prepare" / "job.json").write_text(text)
    message = error_of(capsys, broken_at_the_end, "--out", tmp_path / "out")
    assert "job.json is not what a run left, expected its settings; delete" in message


def test_data_that_lies_there_is_never_overwritten(documents, tmp_path, capsys):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    files = prepared(source, tmp_path / "out")
    message = error_of(capsys, source, "--out", tmp_path / "out", "--limit", 5)
    assert "already holds manifest.json, train.bin, val.bin of other data or settings (" in message
    assert "limit None, now 5)" in message
    (tmp_path / "out" / "manifest.json").unlink()
    assert "already holds train.bin, val.bin of" in error_of(capsys, source, "--out", tmp_path / "out")
    assert files_of(tmp_path / "out") == files


def test_two_processes_do_not_prepare_one_folder(documents, tmp_path, capsys):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    with open_journal(
        tmp_path / "out", {"source": "another", "revision": None}, engine="tiktoken", restartable=True
    ):
        message = error_of(capsys, source, "--out", tmp_path / "out")
    assert "is being prepared by another process, expected one at a time" in message


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_a_folder_that_another_process_finishes_meanwhile_is_left_as_it_is(
    tokenizer, documents, tmp_path, capsys, monkeypatch
):
    """Here between this one's first look at the folder and its own work."""
    source, out = write_json_lines(tmp_path / "a.jsonl", documents), tmp_path / "out"

    made: list[int] = []

    def after_another(path: Path) -> shutil._ntuple_diskusage:
        monkeypatch.undo()
        prepared(source, out)
        made.append((out / "train.bin").stat().st_ino)
        return shutil.disk_usage(path)

    monkeypatch.setattr(shutil, "disk_usage", after_another)
    split = ("--val-fraction", FRACTION, "--split-seed", SEED)
    status = run(source, "--out", out, *split, "--tokenizer", tokenizer, "--engine", "tiktoken")
    assert status == (0 if tokenizer == "gpt2" else 2)
    assert made == [(out / "train.bin").stat().st_ino]
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train.bin", "val.bin"]
    if tokenizer == "char":
        assert "of other data or settings (tokenizer 'gpt2', now 'char')" in capsys.readouterr().err


def test_the_lock_of_a_process_that_has_just_removed_it_is_none(tmp_path, monkeypatch):
    lock = fcntl.flock

    def after_another(file: io.TextIOBase, operation: int) -> None:
        shutil.rmtree(tmp_path / ".prepare")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_another)
    job = partial(open_journal, tmp_path, {"source": "a"}, engine="tiktoken", restartable=True)
    with pytest.raises(UserError, match="is being prepared by another process"), job():
        pass


def test_a_file_system_without_locks_needs_none_and_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    def without_locks(file: io.TextIOBase, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    source = write_json_lines(tmp_path / "a.jsonl", ["one", "two"])
    assert prepared(source, tmp_path / "out") == plain_loop(["one", "two"])
    assert (
        "/lock cannot be locked (Function not implemented); see to it that nothing" in capsys.readouterr().err
    )


@pytest.mark.parametrize("change", ["append", "replace", "add"])
def test_a_source_that_changes_while_it_is_read_is_one_sentence(
    change, documents, tmp_path, capsys, monkeypatch
):
    source = tmp_path / "in" / "a.jsonl"
    source.parent.mkdir()
    write_json_lines(source, documents)
    ranges = sources.json_ranges

    def ranges_and_a_change(path: Path) -> Iterator[tuple[Part, int]]:
        first, *rest = ranges(path)
        yield first
        if change == "append":
            with source.open("a") as file:
                file.write('{"text": "one more"}\n')
        elif change == "replace":
            write_json_lines(tmp_path / "b", [text.upper() for text in documents]).replace(source)
        else:
            write_json_lines(source.parent / "b.jsonl", ["one more"])
        yield from rest

    monkeypatch.setattr(sources, "json_ranges", ranges_and_a_change)
    message = error_of(capsys, source.parent, "--out", tmp_path / "out", "--workers", 1)
    assert message == (
        f"error: {source.parent} has changed while it was read, expected it to stay as it was; "
        "run the same command again once nothing changes it"
    )
    assert list((tmp_path / "out").iterdir()) == []


BAD_LINES = {
    b'{"text": "cut': "line 3 is not JSON (Unterminated string",
    b'"a text"': "line 3 holds a string, expected one JSON object a line",
    b"[" * 100_000: "line 3 is not JSON (maximum recursion depth exceeded",
    b'{"body": "a", "id": 1}': "line 3 has body, id, expected 'text' (set --text-column)",
    b'{"text": 7}': "line 3 holds a number, expected a text",
    b'{"text": null}': "line 3 holds null, expected a text",
    b'{"text": ""}': "line 3 is an empty document, expected at least one character",
    b'{"text": "caf\xe9"}': "line 3 has 0xe9 at byte 13, expected UTF-8",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_line_is_named_with_what_is_wrong(line, message, suffix, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    source = compressed(tmp_path / "a.jsonl", suffix) if suffix else tmp_path / "a.jsonl"
    assert f"{source} {message}" in error_of(capsys, source, "--out", tmp_path / "out")


def test_a_bad_line_far_into_a_plain_file_has_its_own_number(broken_at_the_end, documents, tmp_path, capsys):
    message = error_of(capsys, broken_at_the_end, "--out", tmp_path / "out")
    assert f"a.jsonl line {len(documents) + 1:,} is not JSON" in message


def test_bad_documents_are_counted_and_left_out_on_request(tmp_path, capsys):
    lines = [b'{"text": "one"}', *BAD_LINES, b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert prepared(tmp_path / "a.jsonl", tmp_path / "out", "--skip-bad") == plain_loop(["one", "two"])
    said = "left out: 3 broken JSON, 1 empty, 1 missing column, 2 not a text, 1 undecodable bytes"
    assert said in capsys.readouterr().out
    assert sum(read_manifest(tmp_path / "out").skipped.values()) == len(BAD_LINES)


def test_the_number_of_a_bad_line_is_not_looked_for_unless_it_is_said(tmp_path):
    """For each of many it would be looked for from the start of the file."""
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{\n{"body": "two"}\n{"text": ""}\n')
    ((part, _),) = sources.json_ranges(source)
    documents = part.documents("text")
    assert next(documents) == "one"
    source.rename(tmp_path / "b.jsonl")
    bad = list(documents)
    assert [each.reason for each in bad] == ["broken JSON", "missing column", "empty"]
    (tmp_path / "b.jsonl").rename(source)
    assert bad[-1].sentence == f"{source} line 4 is an empty document, expected at least one character"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_named(suffix, documents, tmp_path, capsys):
    source = compressed(write_json_lines(tmp_path / "a.jsonl", documents), suffix)
    source.write_bytes(source.read_bytes()[:-300])
    message = error_of(capsys, source, "--out", tmp_path / "out")
    assert re.search(rf"{source} from line [\d,]+ on is cut short or damaged \(", message)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_compressed_file_without_a_byte_is_named(name, tmp_path, capsys):
    (tmp_path / name).touch()
    message = error_of(capsys, tmp_path / name, "--out", tmp_path / "out")
    assert f"{tmp_path / name} is cut short or damaged (it has no bytes), expected a complete file" in message


@pytest.mark.parametrize(
    ("suffix", "padding"), [(".gz", 0), (".gz", 9), (".xz", 0), (".xz", 4), (".xz", 100_000), (".zst", 0)]
)
def test_all_streams_of_a_compressed_file_are_read(suffix, padding, documents, tmp_path):
    source = tmp_path / f"all.jsonl{suffix}"
    with source.open("wb") as file:
        for i in range(0, len(documents), 100):
            part = write_json_lines(tmp_path / "a.jsonl", documents[i : i + 100])
            file.write(compressed(part, suffix).read_bytes() + bytes(padding))
    assert prepared(source, tmp_path / "out") == plain_loop(documents)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("between", [b"other bytes", b"\0\0\0\0other bytes", b"\1"])
def test_what_follows_the_first_stream_of_a_compressed_file_and_is_none_is_named(
    suffix, between, tmp_path, capsys
):
    source = compressed(write_json_lines(tmp_path / "a.jsonl", ["one", "two"]), suffix)
    source.write_bytes(source.read_bytes() + between + source.read_bytes())
    message = error_of(capsys, source, "--out", tmp_path / "out")
    assert re.search(rf"{source} from line \d on is cut short or damaged \(", message)


def test_bad_rows_and_truncated_files_of_parquet_are_named(tmp_path, capsys):
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 400 + [None]}), path, row_group_size=300)
    assert f"{path} row 400 holds null, expected a text" in error_of(capsys, path, "--out", out)
    shutil.rmtree(out)
    message = error_of(capsys, path, "--out", out, "--text-column", "body")
    assert f"{path} has text, expected 'body' (set --text-column)" in message
    shutil.rmtree(out)
    path.write_bytes(path.read_bytes()[:-9])
    assert f"{path} is cut short or damaged" in error_of(capsys, path, "--out", out)


def test_every_row_without_the_column_is_counted(tmp_path):
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "in" / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["text"] * 700}), tmp_path / "in" / "b.parquet")
    assert prepared(tmp_path / "in", tmp_path / "out", "--skip-bad") == plain_loop(["one", "two"])
    assert read_manifest(tmp_path / "out").skipped == {"missing column": 700}


def test_a_row_of_parquet_that_is_not_utf_8_is_named(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a"] * 300 + [b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=200)
    message = error_of(capsys, path, "--out", tmp_path / "out")
    assert f"{path} row 300 has 0xe9 at byte 3, expected UTF-8" in message


def test_a_row_of_parquet_with_a_date_that_python_lacks_is_named(tmp_path, capsys):
    dates = pyarrow.array([10**7], pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"text": dates}), path := tmp_path / "a.parquet")
    message = error_of(capsys, path, "--out", tmp_path / "out")
    assert f"{path} row 0 holds a Date32Scalar, expected a text" in message


def test_parquet_with_a_column_whose_name_is_not_utf_8_is_named(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a"], "cafX": ["b"]})
    pyarrow.parquet.write_table(table, path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"cafX", b"caf\xe9"))
    message = error_of(capsys, path, "--out", tmp_path / "out")
    assert f"{path} is cut short or damaged ('utf-8' codec can't decode byte 0xe9 in position 3" in message


def test_a_damaged_page_of_parquet_is_named_with_the_row_where_it_begins(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{i} {'some words ' * 20}" for i in range(2 * arrow.BATCH_ROWS)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, row_group_size=arrow.BATCH_ROWS, use_dictionary=False
    )
    start = pyarrow.parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    parts = [part for part, _ in arrow.row_parts(str(path), 1 << 30, cached=False)]
    read = [document for part in parts for document in part.documents("text")]
    assert read[:-1] == texts[: arrow.BATCH_ROWS]
    assert f"{path} from row {arrow.BATCH_ROWS} on is cut short or damaged (" in read[-1].sentence


def blocks_of(stream: io.BufferedIOBase, separator: str | None = None) -> list[Document]:
    parts = sources.stream_blocks(stream, "a", separator)
    return [document for part in parts for document in part.documents("text")]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_the_documents_before_a_damage_are_read(suffix, documents, tmp_path):
    source = compressed(write_json_lines(tmp_path / "a.jsonl", documents), suffix)
    source.write_bytes(source.read_bytes()[:-300])
    with source.open("rb") as raw, open_stream(raw, suffix) as stream:
        *texts, last = blocks_of(stream)
    assert len(texts) > len(documents) / 2
    assert texts == documents[: len(texts)]
    assert last.sentence.startswith(f"a from line {len(texts) + 1:,} on is cut short or damaged (")


class Dribble(io.BytesIO):
    """A stream that gives at most 7 bytes at once, as a pipe may."""

    def read1(self, size: int | None = -1) -> bytes:
        return super().read1(7)


@pytest.mark.parametrize(("separator", "glue"), [(None, ""), ("%%", "\n%%\n"), ("%%", "\r\n%%\r\n")])
def test_the_parts_of_a_stream_do_not_depend_on_its_pieces(separator, glue, documents):
    if separator is None:
        data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    else:
        data = glue.join(documents).encode()
    parts = list(sources.stream_blocks(io.BytesIO(data), "a", separator))
    assert len(parts) > 5
    assert max(len(part.data) for part in parts) <= SMALL_PARTS
    assert parts == list(sources.stream_blocks(Dribble(data), "a", separator))
    assert blocks_of(io.BytesIO(data), separator) == documents


def test_a_separator_behind_a_byte_order_mark_is_one():
    empty, *texts = blocks_of(io.BytesIO(b"\xef\xbb\xbf%%\none\n%%\ntwo\n"), "%%")
    assert texts == ["one", "two"]
    assert "a line 1 is an empty document" in empty.sentence


# jax, loaded by other tests, warns of any fork; this one sets a limit and starts another program.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_disk_that_fills_ends_the_run_with_what_was_finished_kept(documents, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", [*documents, "long " * 100_000])
    process = started(
        source,
        "--out",
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(
        r"^error: cannot write .*\.shard \(File too large\), expected room", errors, re.MULTILINE
    )
    assert "Traceback" not in errors
    assert len(list((tmp_path / "out" / ".prepare").glob("*.shard"))) > 3


def test_too_little_disk_space_is_found_before_the_start(documents, tmp_path, capsys, monkeypatch):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "has 0 bytes free, expected about" in error_of(capsys, source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.jsonl"], "there is no file, folder or data set 'nowhere.jsonl', expected a path"),
        (["--val-fraction", 1.0], "got --val-fraction 1.0, expected at least 0 and below 1"),
        (["--workers", 0], "got --workers 0, expected 1 or more"),
        (["--limit", 0], "got --limit 0, expected 1 or more documents"),
        (["--limit", 2**63], "got --limit 9223372036854775808, expected 1 or more documents, up to 9,223,"),
        (["--limit", 1, "--val-fraction", 0.5], "got 1 documents of which 1 would validate"),
        (["--split-seed", -1], "got --split-seed -1, expected 0 or more"),
        (["--tokenizer", "char", "--engine", "fastokens"], "expected it installed and --tokenizer gpt2"),
        (["--separator", ""], "got --separator '', expected one line of UTF-8 that is not empty"),
        (["--separator", "a\nb"], "got --separator 'a\\nb', expected one line"),
        (["--separator", "a\r"], "got --separator 'a\\r', expected one line"),
        (["--separator", os.fsdecode(b"\xe9")], "got --separator '\\udce9', expected one line of UTF-8"),
        (["--separator", "---"], "expected one argument, expected what"),
        (
            ["--val-fractoin", 0.1],
            "got --val-fractoin, expected what `python -m nanogpt.prepare --help` lists",
        ),
        (["--val-fractoin", 0.1], "; did you mean --val-fraction?"),
        (["--workers", "two"], "argument --workers: invalid int value: 'two', expected what"),
        ([""], "got an empty SOURCE, expected"),
        (["--out", ""], "argument --out: got an empty name, expected what"),
        (["/dev/null"], "/dev/null is a pipe or a device, expected a file or a folder"),
        (["x" * 5000], "cannot read the source ([Errno 36] File name too long"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(flags, message, tmp_path, capsys):
    source = write_json_lines(tmp_path / "a.jsonl", ["one", "two"])
    arguments = [source, *flags] if flags[0].startswith("--") else flags
    assert message in error_of(capsys, *arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("a.txt", ["--limit", 5], "got --limit for {}, a single text, expected documents; leave it out"),
        ("a.txt", ["--split-seed", 5], "got --split-seed for {}, a single text, expected documents; leave"),
        (
            "a.txt",
            ["--text-column", "body"],
            "--text-column for {}, a single text, expected rows with columns",
        ),
        (
            "a.txt",
            ["--separator", "%", "--text-column", "body"],
            "got --text-column for {}, text, expected rows",
        ),
        (
            "a.jsonl",
            ["--separator", "%"],
            "got --separator for {}, JSON lines, expected text files or text piped",
        ),
        (
            "a.parquet",
            ["--separator", "%"],
            "got --separator for {}, parquet, expected text files or text piped",
        ),
        (
            "shakespeare",
            ["--separator", "%"],
            "got --separator for shakespeare, a single text, expected text f",
        ),
        (
            "a.jsonl",
            ["--revision", "main"],
            "got --revision for {}, JSON lines, expected a data set of the hub",
        ),
        (
            "a.parquet",
            ["--config", "small"],
            "got --config for {}, parquet, expected a data set of the hub; lea",
        ),
        (
            "shakespeare",
            ["--split", "test"],
            "got --split for shakespeare, a single text, expected a data set",
        ),
        (
            "a.parquet",
            ["--cached"],
            "got --cached for {}, parquet, expected a data set of the hub; leave it out",
        ),
        (
            "-",
            ["--cached"],
            "got --cached for standard input, JSON lines, expected a data set of the hub; leave",
        ),
    ],
)
def test_a_flag_that_would_do_nothing_for_the_source_is_refused(
    source, flags, message, tmp_path, capsys, monkeypatch
):
    data = write_json_lines(tmp_path / "a.jsonl", ["one", "two"]).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    (tmp_path / "a.txt").write_text("a text")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    source = tmp_path / source if "." in source else source
    assert message.format(source) in error_of(capsys, source, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_source_that_goes_away_is_one_sentence(documents, tmp_path):
    (tmp_path / "in").mkdir()
    write_json_lines(tmp_path / "in" / "a.jsonl", documents)
    source = sources.find_source(str(tmp_path / "in"), sources.Options())
    (tmp_path / "in" / "a.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"cannot read the source \(.*No such file .*: it continues where it was"
    ):
        list(source.shards())


def test_a_source_that_is_cut_short_meanwhile_is_one_sentence(documents, tmp_path, capsys, monkeypatch):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    ranges = list(sources.json_ranges(source))
    os.truncate(source, ranges[0][1])  # where a line ends: what is left is complete
    monkeypatch.setattr(sources, "json_ranges", lambda path: iter(ranges))
    message = error_of(capsys, source, "--out", tmp_path / "out", "--workers", 1)
    assert f"cannot read the source ({source} has become shorter), expected it to stay" in message


def test_a_folder_of_several_kinds_is_refused(documents, tmp_path, capsys):
    write_json_lines(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.txt").write_text("text")
    message = error_of(capsys, tmp_path, "--out", tmp_path / "out")
    assert "holds JSON lines and text, expected files of one kind" in message


def test_files_of_other_kinds_in_a_folder_are_said_to_be_left_out(documents, tmp_path, capsys):
    write_json_lines(tmp_path / "a.jsonl", documents)
    for name in ("b.csv", "README.MD", "LICENSE", ".hidden"):
        (tmp_path / name).write_text("text")
    (tmp_path / "c.csv").symlink_to("b.csv")
    assert prepared(tmp_path, tmp_path / "out") == plain_loop(documents)
    said = f"left out of {tmp_path}: 2 .csv, 1 .md, 1 LICENSE, expected .parquet, .jsonl or .txt"
    assert capsys.readouterr().err.count(said) == 1


def test_files_beside_a_single_text_are_said_to_be_left_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a text of some length")
    (tmp_path / "b.md").write_text("another")
    assert run(tmp_path, "--out", tmp_path / "out") == 0
    assert f"left out of {tmp_path}: 1 .md, expected" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.parquet.gz", "b.TXT.zip", "b.zip", "b.tar.gz"])
@pytest.mark.parametrize("source", ["", "name"])
def test_files_that_are_packed_in_other_ways_are_refused(name, source, tmp_path, capsys):
    write_json_lines(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / name).write_bytes(b"data")
    source = tmp_path / (source and name)
    message = error_of(capsys, source, "--out", tmp_path / "out")
    assert f"{tmp_path / name} is packed in a way that is not read, expected .gz, .xz or .zst of" in message


def test_endings_in_capitals_mean_the_same(documents, tmp_path):
    (tmp_path / "in").mkdir()
    write_json_lines(tmp_path / "in" / "a.JSONL", documents[:300])
    rest = write_json_lines(tmp_path / "rest.jsonl", documents[300:])
    compressed(rest, ".gz").rename(tmp_path / "in" / "b.jsonl.GZ")
    assert prepared(tmp_path / "in", tmp_path / "out") == plain_loop(documents)
    assert prepared(tmp_path / "in" / "a.JSONL", tmp_path / "one") == plain_loop(documents[:300])
    assert prepared(tmp_path / "in" / "b.jsonl.GZ", tmp_path / "other") == plain_loop(documents[300:])


def test_linked_folders_are_read(documents, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    write_json_lines(tmp_path / "in" / "a.jsonl", documents[:300])
    write_json_lines(tmp_path / "elsewhere" / "deep" / "b.jsonl", documents[300:])
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    assert prepared(tmp_path / "in", tmp_path / "out") == plain_loop(documents)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.symlink_to("nowhere"),
            "is a link to nothing, a pipe or a device, expected a file",
        ),
        (os.mkfifo, "is a link to nothing, a pipe or a device, expected a file or a folder"),
        (lambda path: path.symlink_to(path.parent), "is {} once more, by a link, expected it once"),
        (
            lambda path: path.symlink_to("a.jsonl"),
            "is {}/a.jsonl once more, by a link, expected it once; rem",
        ),
        (
            lambda path: path.symlink_to("b.jsonl"),
            "is a link to nothing, a pipe or a device, expected a file or a f",
        ),
    ],
)
def test_what_in_a_folder_is_no_file_or_folder_of_its_own_is_refused(make, message, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_json_lines(tmp_path / "in" / "a.jsonl", ["one", "two"])
    make(tmp_path / "in" / "b.jsonl")
    found = error_of(capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert f"{tmp_path / 'in' / 'b.jsonl'} {message.format(tmp_path / 'in')}" in found


def test_a_folder_in_the_source_that_cannot_be_read_is_one_sentence(tmp_path, capsys, monkeypatch):
    listed = Path.iterdir

    def iterdir(path: Path):
        if path.name == "closed":  # permissions would not stop root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    (tmp_path / "in" / "closed").mkdir(parents=True)
    write_json_lines(tmp_path / "in" / "a.jsonl", ["one", "two"])
    message = error_of(capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert "cannot read the source ([Errno 13] Permission denied: " in message
    assert "expected it to stay where it is and readable; mend that and run the same command again" in message


@pytest.mark.parametrize("name", ["dump", "a.jsonl.1", "dump.gz"])
def test_json_lines_under_an_unknown_ending_are_not_taken_for_a_text(name, tmp_path, capsys):
    data = write_json_lines(tmp_path / "a.jsonl", ["one", "two"]).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    message = error_of(capsys, tmp_path / name, "--out", tmp_path / "out")
    assert f"{tmp_path / name} begins with a JSON object, expected a text; give it a name that" in message


def test_a_file_beside_its_compressed_copy_is_not_read_twice(documents, tmp_path, capsys):
    compressed(write_json_lines(tmp_path / "a.jsonl", documents), ".gz")
    message = error_of(capsys, tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path} holds a.jsonl and a.jsonl.gz, expected one of them" in message


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_out_that_cannot_be_written_is_one_sentence_before_the_source_is_read(out, tmp_path, capsys):
    source = write_json_lines(tmp_path / "a.jsonl", [])  # which has no characters
    (tmp_path / "file").write_text("not a folder")
    message = error_of(capsys, source, "--out", tmp_path / out, "--tokenizer", "char")
    assert f"cannot write to {tmp_path / 'file'}, expected a folder of yours; choose another --out" in message


def sample_by(encode, texts: list[str], turn: int) -> Sample:
    pieces = sample_of(texts, turn)
    return Sample(pieces, *encode(pieces))


def test_a_fast_tokenizer_that_differs_anywhere_in_the_first_documents_is_found():
    def wrong_at_the_end(texts):
        ids, lengths = encode_each(gpt2(), texts)
        ids[-1] ^= 1
        return ids, lengths

    texts = ["a text", "another text"]
    check_sample(sample_by(partial(encode_each, gpt2()), texts, 0), gpt2())
    with pytest.raises(EnginesDifferError):
        check_sample(sample_by(wrong_at_the_end, texts, 0), gpt2())


def test_a_fast_tokenizer_that_is_wrong_later_is_found_in_the_samples_of_those_batches():
    def wrong(texts):
        return encode_each(gpt2(), [text.upper() for text in texts])

    texts = ["some text " * 1000, "other words " * 1000]
    for turn in range(1, 9):
        check_sample(sample_by(partial(encode_each, gpt2()), texts, turn), gpt2())
        with pytest.raises(EnginesDifferError):
            check_sample(sample_by(wrong, texts, turn), gpt2())


def test_samples_are_of_a_fraction_of_the_text_and_of_other_places_each_time():
    text = "".join(f"{i:07d} " for i in range(50_000))
    pieces = [piece for turn in range(1, 100) for piece in sample_of([text], turn)]
    assert {len(piece) for piece in pieces} == {int(len(text) * SAMPLE_FRACTION)}
    assert len(set(pieces)) == 99
    assert "".join(sample_of(["a" * FIRST_CHARACTERS, "b", "c"], 0)) == "a" * FIRST_CHARACTERS
    assert sample_of(["a" * (FIRST_CHARACTERS - 1), "b", "c"], 0)[1:] == ["b"]


FAKE_FASTOKENS = """
import numpy
class Tokenizer:
    @staticmethod
    def from_json_str(text):
        return Tokenizer()
    def encode_batch_flat(self, texts):
        lengths = [0] + [len(text) for text in texts]
        return numpy.zeros(sum(lengths), numpy.uint32).tobytes(), numpy.cumsum(lengths).astype("u8").tobytes()
"""


@pytest.fixture
def with_wrong_fastokens(tmp_path) -> dict[str, str]:
    """The environment of a process that finds FAKE_FASTOKENS installed."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "fastokens.py").write_text(FAKE_FASTOKENS)
    path = os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    return os.environ | {"PYTHONPATH": path}


def test_a_fast_tokenizer_that_differs_is_given_up_loudly(documents, tmp_path, with_wrong_fastokens):
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    flags = ("--val-fraction", FRACTION, "--split-seed", SEED)
    process = started(source, "--out", tmp_path / "out", *flags, env=with_wrong_fastokens)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "warning: fastokens disagrees with tiktoken on this input" in errors
    assert files_of(tmp_path / "out") == plain_loop(documents)


def test_what_is_piped_in_is_not_read_on_by_another_tokenizer(documents, tmp_path, with_wrong_fastokens):
    """Its first documents are gone."""
    with write_json_lines(tmp_path / "a.jsonl", documents).open() as stream:
        process = started("-", "--out", tmp_path / "out", env=with_wrong_fastokens, stdin=stream)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1] == (
        "error: fastokens disagrees with tiktoken on this input (other ids for the same text), expected the "
        "same ids, and standard input cannot be read a second time; pipe it in again with --engine tiktoken, "
        "which is slower"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_fastokens_gives_the_ids_of_tiktoken(documents):
    pytest.importorskip("fastokens")
    draw = random.Random(0)
    odd = [
        "".join(
            chr(draw.choice([32, 10, 39, 0xE9, 0x4E2D, 0x1F600, draw.randrange(0xD800)])) for _ in range(30)
        )
        for _ in range(2000)
    ]
    for got, expected in zip(
        fastokens_encoder()([*documents, *odd]), encode_each(gpt2(), [*documents, *odd]), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda folder: (folder / "train.bin").write_bytes(b"12"),
            r"train\.bin has bytes 2, expected \d+ as",
        ),
        (lambda folder: (folder / "val.bin").unlink(), r"val\.bin has bytes None, expected"),
        (lambda folder: change_byte(folder / "train.bin"), r"train\.bin has the sha256 \w+, expected"),
        (
            lambda folder: edit_manifest(folder, lambda m: m["documents"].update(val=9)),
            "ends of text 1, expected 9",
        ),
        (
            lambda folder: edit_manifest(folder, lambda m: m.update(max_token_id=9)),
            "the largest id 50256, expected 9",
        ),
        (
            lambda folder: edit_manifest(folder, lambda m: m.update(vocab_size=9)),
            "vocabulary 50257, expected 9",
        ),
        (
            lambda folder: edit_manifest(folder, lambda m: m["tokenizer"].update(sha256="1")),
            "with the hash 1, expected",
        ),
        (lambda folder: edit_manifest(folder, lambda m: m.pop("tokens")), "is not a manifest of version 1"),
        (
            lambda folder: edit_manifest(folder, lambda m: m.update(tokens={"train": 1})),
            "is not a manifest of version 1",
        ),
        (lambda folder: edit_manifest(folder, lambda m: m.update(sha256={})), "is not a manifest of version"),
        (
            lambda folder: edit_manifest(folder, lambda m: m.update(vocab_size="9")),
            "is not a manifest of ver",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 200_000), r"is not JSON \(maximum"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json, expected a folder that"),
    ],
)
def test_verify_finds_what_is_not_as_the_manifest_says(harm, message, tmp_path):
    shutil.copytree(ensure_bundled(), tmp_path / "data")
    check.verify(tmp_path / "data")
    harm(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        check.verify(tmp_path / "data")


def test_inspect_shows_counts_lengths_and_documents(documents, tmp_path, capsys):
    prepared(write_json_lines(tmp_path / "a.jsonl", documents), tmp_path / "out")
    capsys.readouterr()
    assert run("inspect", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    lengths = sorted(len(gpt2().encode(text)) + 1 for text in documents)
    assert f"{tmp_path / 'out'}: {tmp_path / 'a.jsonl'}, gpt2, 50,257 ids" in shown
    assert f"100 %: {lengths[-1]:,}" in shown
    assert "First Citizen:\\nBefore we proceed" in shown


def test_the_files_may_be_made_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["shakespeare", "--out=~/data"]).out == tmp_path / "data"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_in_the_place_of_the_folder_is_named_and_not_its_permissions(command, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("To be")
    assert run(command, tmp_path / "a.txt") == 2
    assert "a.txt has no manifest.json, expected a folder that" in capsys.readouterr().err


def test_inspect_names_an_id_that_is_none(tmp_path, capsys):
    shutil.copytree(ensure_bundled(), tmp_path / "data")
    with (tmp_path / "data/train.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    assert run("inspect", tmp_path / "data") == 2
    assert "train.bin holds the id 65535, expected ids below 50257; delete" in capsys.readouterr().err


def test_inspect_names_a_vocabulary_that_is_not_the_tokenizers(tmp_path, capsys):
    """Or it would show documents of ids that the tokenizer lacks."""
    shutil.copytree(ensure_bundled("char"), tmp_path / "data")
    edit_manifest(tmp_path / "data", lambda manifest: manifest.update(vocab_size=9_999))
    assert run("inspect", tmp_path / "data") == 2
    assert ", expected 9999 as manifest.json says; delete the folder" in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_printed_escaped(tmp_path):
    """Rather than a traceback after all the work."""
    (tmp_path / "a.txt").write_text("naïve " * 20)
    out, environment = tmp_path / "données", os.environ | {"PYTHONIOENCODING": "ascii"}
    for arguments, last in (
        ([tmp_path / "a.txt", "--out", out], "donn\\xe9es: ready"),
        (["inspect", out], "| 'na\\xefve na\\xefve <|endoftext|>'"),
    ):
        process = started(*arguments, env=environment)
        shown, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert shown.endswith(f"{last}\n")


def test_a_reader_who_has_seen_enough_ends_inspect_without_a_traceback(tmp_path):
    ensure_bundled()
    command = f"exec 3>&1; {sys.executable} -m nanogpt.prepare inspect {ensure_bundled()} 2>&3 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


def test_progress_is_plain_lines_where_there_is_no_terminal(documents, tmp_path, capsys):
    prepared(write_json_lines(tmp_path / "a.jsonl", documents), tmp_path / "out")
    errors = capsys.readouterr().err
    assert "\r" not in errors
    assert re.search(
        rf"^{len(documents):,} documents, [\d.]+K tokens, \w+ [\d.]+[KM] tokens/s, [\d.]+ [KM]B/s$",
        errors,
        re.MULTILINE,
    )


def test_megabytes_a_second_are_of_utf_8(tmp_path: Path):
    texts = ["ascii", "naïve", "日本語", "😀", "\ud800"]  # 5, 6, 9, 4 and 3 bytes
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    ((part, size),) = sources.json_ranges(source)
    tokenizer = json.dumps(gpt2().describe())
    job = Job(
        folder=str(tmp_path),
        tokenizer=tokenizer,
        engine="tiktoken",
        column="text",
        skip_bad=False,
        limit=None,
    )
    record, _ = encode_shard(sources.Shard(0, size, part), job)
    assert (record.documents, record.text_bytes) == (5, 27)


@pytest.mark.parametrize("width", [30, 200])
def test_the_live_line_is_no_longer_than_the_terminal(width: int):
    main_end, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, width))
    with os.fdopen(terminal, "w") as stream:
        progress = Progress(1000, engine="tiktoken", kept={}, stream=stream)
        record = Record(
            index=0, documents=10**7, tokens=10**10, text_bytes=1, source_bytes=500, sha256="", skipped={}
        )
        progress.add(record)
        shown = b""
        while select.select([main_end], [], [], 0.1)[0]:
            shown += os.read(main_end, 10_000)
    os.close(main_end)
    lines = shown.decode().split("\r\x1b[K")[1:]
    assert len(lines) == 2
    assert all(len(line) < width for line in lines)
    assert "[############            ]  50%"[: width - 1] in lines[1]


def test_the_time_for_openwebtext_is_told_once_from_the_rate_after_the_first_record(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(None, engine="tiktoken", kept={})
    for index, clock[0] in enumerate((100.0, 101.0, 104.0, 105.0)):
        progress.add(
            Record(
                index=index, documents=1, tokens=10**6, text_bytes=1, source_bytes=1, sha256="", skipped={}
            )
        )
    said = capsys.readouterr().err
    # 2 M tokens in the 4 s after the first record; the 100 s before it were no work
    whole = format_seconds((9_035_582_198 + 4_434_897) / 0.5e6)
    assert f"at this rate all of OpenWebText would take {whole}\n" in said
    assert said.count("OpenWebText") == 1


def test_a_data_set_of_the_hub_without_a_network_is_one_sentence(tmp_path, capsys):
    message = error_of(capsys, "some/where", "--out", tmp_path / "out")
    assert message.startswith("error: cannot read some/where (")
    assert not (tmp_path / "out").exists()
