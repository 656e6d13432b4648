"""Token files, and the batch of a step as a pure function of the step.

A file is raw little-endian uint16, as nanoGPT writes it. It is cut into windows of T inputs and their T
targets, shifted by one. An epoch visits every window once, in an order that (seed, epoch) decides. So the
position in the data never has to be saved: `batch_at(tokens, step, spec)` follows from the step.
"""

import hashlib
import json
import mmap
import os
import shlex
import weakref
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nanogpt.errors import UserError

TOKEN_BYTES = 2
RELEASE_BYTES = 64 << 20  # mapped pages are released after this much reading, so resident memory stays flat
FAULT_BYTES = 2 << 20  # the most that the kernel maps around one touched page: a large folio of its cache
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 1024, 4096


class Batch(NamedTuple):
    """A accumulation steps of B sequences of T tokens, and for each token the one that follows it."""

    inputs: Int[Tensor, "A B T"]
    targets: Int[Tensor, "A B T"]


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """How a step's sequences are cut and distributed over processes and microsteps."""

    block_size: int
    """T, tokens in a sequence."""
    batch_size: int
    """B, sequences of one process in one microstep."""
    total_batch_size: int
    """Tokens of all processes in a step; a multiple of B x T x process_count."""
    seed: int
    """Decides the order of the windows, together with the epoch."""
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        for name in ("block_size", "batch_size", "process_count"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.process_index < self.process_count:
            raise UserError(
                f"process_index is {self.process_index}, expected 0 to {self.process_count - 1} for "
                f"{self.process_count} processes"
            )
        micro = self.block_size * self.batch_size * self.process_count
        if self.total_batch_size < 1 or self.total_batch_size % micro:
            raise UserError(
                f"a total batch of {self.total_batch_size:,} tokens does not divide into microsteps of "
                f"{micro:,} ({self.process_count} devices x {self.batch_size} sequences x {self.block_size} "
                f"tokens); "
                f"set --data.total-batch-size to a multiple of {micro:,} or change --data.batch-size"
            )

    @property
    def accumulation(self) -> int:
        """A, microsteps in a step."""
        return self.total_batch_size // (self.block_size * self.batch_size * self.process_count)

    @property
    def sequences(self) -> int:
        """Sequences of all processes in a step."""
        return self.total_batch_size // self.block_size


@runtime_checkable
class Tokens(Protocol):
    """A sequence of token ids: a numpy array, or a file that is read as it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice) -> np.ndarray: ...


class MappedTokens:
    """A token file mapped into memory; touched pages are released every 64 MiB."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._tokens = np.frombuffer(self._map, dtype="<u2")
        self._read_bytes = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, window: slice) -> np.ndarray:
        size = self._map.size()
        if size < len(self._map):  # touching what is no longer there would kill the process
            raise cut_while_in_use(self._path, size)
        copy = self._tokens[window].copy()
        self._read_bytes += copy.nbytes + FAULT_BYTES
        if self._read_bytes > RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read_bytes = 0
        return copy


class PreadTokens:
    """A token file read with `pread`, for file systems that cannot be mapped."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._length = os.fstat(self._file.fileno()).st_size // TOKEN_BYTES

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(self._length)
        count = max(stop - start, 0) * TOKEN_BYTES
        data = os.pread(self._file.fileno(), count, start * TOKEN_BYTES)
        if len(data) != count:
            raise cut_while_in_use(self._file.name, start * TOKEN_BYTES + len(data))
        return np.frombuffer(data, dtype="<u2")


def cut_while_in_use(path: Path | str, size: int) -> UserError:
    """The error for a token file that has become shorter since it was opened."""
    return UserError(
        f"{path} ends at byte {size:,}, before where it ended when it was opened; was it cut while in use? "
        f"Put the whole file back, and resume"
    )


def open_tokens(path: Path) -> Tokens:
    """The tokens of a file: mapped if the file system allows it, else read with `pread`.

    Raises UserError for a file that is missing, unreadable, empty or of an odd number of bytes.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(
                f"{path} is empty, expected uint16 tokens; prepare it again with python -m nanogpt.prepare, "
                "and with a --val-fraction that leaves documents for both files"
            )
        if size % TOKEN_BYTES:
            raise UserError(
                f"{path} has an odd number of bytes ({size:,}), expected two for each token; "
                f"it was cut or is not a token file: prepare it again with python -m nanogpt.prepare"
            )
        try:
            return MappedTokens(path)
        except OSError:
            return PreadTokens(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"no token file at {path}; set --data.path to a folder with train.bin and val.bin, "
            f"or make one with python -m nanogpt.prepare SOURCE --out DIR"
        ) from error
    except PermissionError as error:
        raise UserError(
            f"no permission to read {path}; expected a readable file: change its mode or owner"
        ) from error


def check_tokens(
    tokens: Tokens, path: Path, *, vocab_size: int, block_size: int, max_token_id: int | None
) -> None:
    """Raises UserError unless the file holds a window and only ids below `vocab_size`.

    `max_token_id` comes from the manifest; without one, the whole file is read once.
    """
    if len(tokens) < block_size + 1:
        raise UserError(
            f"{path} has {len(tokens):,} tokens, expected at least {block_size + 1:,} (a window and its last "
            f"target); set a smaller --model.block-size or prepare more text"
        )
    if max_token_id is not None and max_token_id < vocab_size:
        return
    beginning = tokens[:1024]
    if max_token_id is None and beginning[::2].any() and not beginning[1::2].any():
        raise UserError(
            f"{path} begins with a 0 at every second position, as numbers of four or eight bytes do, "
            f'expected raw uint16; write it with numpy\'s .astype("uint16").tofile'
        )
    step = RELEASE_BYTES // TOKEN_BYTES
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        if chunk.max() >= vocab_size:
            position = start + int((chunk >= vocab_size).argmax())
            raise UserError(
                f"{path} has token id {tokens[position : position + 1][0]} at position {position:,}, "
                f"expected ids below {vocab_size:,}; prepare it with this vocabulary's tokenizer or set "
                f"--model.vocab-size"
            )


def window_count(token_count: int, block_size: int) -> int:
    """Number of windows of `block_size` inputs and one more target; a remainder at the end is not used."""
    return max(token_count - 1, 0) // block_size


def batch_at(tokens: Tokens, step: int | Int[Tensor, ""], spec: BatchSpec) -> Batch:
    """This process's part of a step's batch: int64 on the CPU, a pure function of the arguments.

    Sequence g of a step is the same for any number of processes P; it belongs to microstep g // (P B) and
    there to process (g // B) mod P. Epochs follow each other without a gap, so a batch may hold the end of
    one and the start of the next. Raises UserError for a negative step, or if the tokens hold no window.
    """
    if int(step) < 0:
        raise UserError(f"got step {int(step)}, expected at least 0")
    windows = window_count(len(tokens), spec.block_size)
    if windows == 0:
        raise UserError(
            f"got {len(tokens):,} tokens, expected at least {spec.block_size + 1:,} (a window and its last "
            f"target); set a smaller --model.block-size or prepare more text"
        )
    A, B, T = spec.accumulation, spec.batch_size, spec.block_size
    starts = window_at(int(step) * spec.sequences + dealt_places(spec), windows, spec.seed) * T
    rows = np.empty((A * B, T + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        row[:] = tokens[start : start + T + 1]
    both = rows.reshape(A, B, T + 1)
    # Copied by numpy: torch's threads would take the cores of the step that runs meanwhile.
    return Batch(*(torch.from_numpy(part.copy()) for part in (both[..., :-1], both[..., 1:])))


def require_ids(batch: Batch, vocab_size: int, folder: Path) -> None:
    """Raises UserError if a token of the batch is not in the vocabulary: its file has changed."""
    largest = max(int(batch.inputs.max()), int(batch.targets.max()))
    if largest >= vocab_size:
        raise UserError(
            f"{folder} has token id {largest}, expected ids below {vocab_size:,}, as its manifest says; find "
            f"what is damaged with python -m nanogpt.prepare verify {shlex.quote(str(folder))}"
        )


def batch_hash(batch: Batch, step: int, spec: BatchSpec) -> int:
    """A 63-bit hash of this process's part of a step's batch; the whole's is the parts' sum modulo 2^63.

    It depends on the tokens and on each sequence's place in the step, not on which process reads it.
    """
    A, B, _ = batch.inputs.shape
    places = dealt_places(spec).astype(np.uint64)
    rows = np.concatenate([batch.inputs.numpy(), batch.targets.numpy()[..., -1:]], axis=-1).reshape(A * B, -1)
    sums = np.array([zlib.crc32(row.astype("<u4").tobytes()) for row in rows], dtype=np.uint64)
    with np.errstate(over="ignore"):
        hashes = mix64(sums ^ mix64(places + np.uint64(step * spec.sequences)))
        return int(hashes.sum(dtype=np.uint64) & np.uint64(2**63 - 1))


def dealt_places(spec: BatchSpec) -> np.ndarray:
    """The places in a step, from 0 to `spec.sequences`, of this process's sequences."""
    shape = (spec.accumulation, spec.process_count, spec.batch_size)
    return np.arange(spec.sequences).reshape(shape)[:, spec.process_index].ravel()


def window_at(position: np.ndarray, windows: int, seed: int) -> np.ndarray:
    """The window at each position of the endless sequence of epochs, each a permutation of its own."""
    epoch, offset = np.divmod(position.astype(np.uint64), np.uint64(windows))
    return permute(offset, windows, mix64(mix64(np.uint64(seed % 2**64)) ^ epoch)).astype(np.int64)


def permute(x: np.ndarray, n: int, key: np.ndarray | np.uint64) -> np.ndarray:
    """A permutation of [0, n), chosen by `key`, at x. No table: a billion windows cost what ten do.

    Four Feistel rounds permute the smallest even number of bits that holds n; a result outside [0, n) is
    permuted again until it is inside. Source: Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains".
    """
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    key = np.broadcast_to(key, x.shape)

    def rounds(x: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for number in range(4):
            left, right = right, left ^ (mix64(key + (right << np.uint64(3)) + np.uint64(number)) & mask)
        return left << half | right

    y = rounds(x, key)
    while (outside := y >= n).any():
        y[outside] = rounds(y[outside], key[outside])
    return y


def mix64(x: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """64 well-mixed bits of each uint64. Source: the finalizer of SplitMix64, Steele et al. 2014."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def prefetch(
    batch_of: Callable[[int], Batch], steps: range, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches of `steps` on `device`; each is read, pinned and copied while the one before is in use."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    if not steps:
        return

    def load(step: int) -> tuple[Batch, torch.Event | None]:
        batch = batch_of(step)
        if stream is None:
            return Batch(*(part.to(device) for part in batch)), None
        with torch.cuda.stream(stream):
            moved = Batch(*(part.pin_memory().to(device, non_blocking=True) for part in batch))
        return moved, stream.record_event()

    def start() -> None:
        if stream is not None:  # otherwise every process would create a context on GPU 0 too
            torch.cuda.set_device(stream.device)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=start) as pool:
        pending = pool.submit(load, steps[0])
        for step in steps:
            batch, copied = pending.result()
            if step != steps[-1]:
                pending = pool.submit(load, step + steps.step)
            if copied is not None:
                torch.cuda.current_stream(device).wait_event(copied)
                # Keeps the allocator from reusing this memory while the step still reads it.
                for part in batch:
                    part.record_stream(torch.cuda.current_stream(device))
            yield batch


def read_manifest(folder: Path) -> dict | None:
    """What `nanogpt.prepare` wrote about a folder of tokens; None without a manifest (nanoGPT's)."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); prepare the folder again or remove the manifest"
        ) from error
    try:
        counts = [manifest["tokens"]["train"], manifest["tokens"]["val"], manifest["max_token_id"]]
        is_whole = all(isinstance(count, int) for count in counts) and isinstance(manifest["tokenizer"], dict)
    except (LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(
            f"{path} is not what nanogpt.prepare writes; prepare the folder again or remove the manifest"
        )
    return manifest


def fingerprint(tokens: Tokens) -> str:
    """A hash of the length and of 1,024 evenly spaced blocks of 4 KiB, which cover all of a small file."""
    digest = hashlib.sha256(f"{len(tokens)}:".encode())
    count = FINGERPRINT_BLOCK_BYTES // TOKEN_BYTES
    for start in np.linspace(0, max(len(tokens) - count, 0), FINGERPRINT_BLOCKS, dtype=np.int64).tolist():
        digest.update(tokens[start : start + count].astype("<u2").tobytes())
    return digest.hexdigest()
