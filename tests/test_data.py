"""An epoch covers every window once, for any number of processes; files are read without filling memory."""

import mmap
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import data
from nanogpt.data import (
    Batch,
    BatchSpec,
    MappedTokens,
    PreadTokens,
    batch_at,
    batch_hash,
    check_tokens,
    fingerprint,
    mix64,
    open_tokens,
    permute,
    prefetch,
    read_manifest,
    window_at,
    window_count,
)
from nanogpt.errors import UserError

CPU = torch.device("cpu")
T = 4


def make_spec(
    sequences: int, *, batch_size: int = 1, seed: int = 0, index: int = 0, count: int = 1
) -> BatchSpec:
    return BatchSpec(
        block_size=T,
        batch_size=batch_size,
        total_batch_size=sequences * T,
        seed=seed,
        process_index=index,
        process_count=count,
    )


def counting_tokens(windows: int, *, left_over: int = 0) -> np.ndarray:
    """Token i is i, so that the first token of a window says where the window is."""
    return np.arange(windows * T + 1 + left_over, dtype=np.uint16)


def windows_of(batch: Batch) -> list[int]:
    return (batch.inputs[..., 0] // T).flatten().tolist()


def epoch_order(windows: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    return window_at(np.arange(windows) + epoch * windows, windows, seed).tolist()


# The order


@pytest.mark.parametrize(
    ("windows", "sequences", "batch_size"),
    [(1, 1, 1), (12, 4, 2), (100, 10, 5), (128, 32, 8), (1023, 11, 11)],
)
def test_an_epoch_covers_every_window_exactly_once(windows: int, sequences: int, batch_size: int):
    tokens, spec = counting_tokens(windows, left_over=T - 1), make_spec(sequences, batch_size=batch_size)
    steps = range(windows // sequences)
    seen = [window for step in steps for window in windows_of(batch_at(tokens, step, spec))]
    assert sorted(seen) == list(range(windows))


def test_epochs_follow_each_other_inside_a_batch():
    windows, sequences = (
        10,
        4,
    )  # 5 steps hold 2 epochs, and the third step the end of one and the start of the next
    tokens, spec = counting_tokens(windows), make_spec(sequences)
    seen = [window for step in range(5) for window in windows_of(batch_at(tokens, step, spec))]
    assert sorted(seen[:windows]) == sorted(seen[windows:]) == list(range(windows))


def test_two_epochs_have_different_orders():
    assert epoch_order(100) != epoch_order(100, epoch=1)


def test_any_two_seeds_have_different_orders():
    seeds = (0, 1, 127, 128, 2**32, 2**63)
    assert len({tuple(epoch_order(100, seed=seed)) for seed in seeds}) == len(seeds)


def test_negative_and_huge_seeds_are_seeds_too():
    assert epoch_order(100, seed=-1) == epoch_order(100, seed=2**64 - 1) != epoch_order(100, seed=2**63)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_any_number_of_processes_splits_the_same_global_batch(processes: int):
    tokens, sequences = counting_tokens(1000), 48
    for step in (0, 7, 20, 21):  # the 20th straddles two epochs
        whole = windows_of(batch_at(tokens, step, make_spec(sequences)))
        specs = [make_spec(sequences, batch_size=2, index=i, count=processes) for i in range(processes)]
        parts = [batch_at(tokens, step, spec) for spec in specs]
        microsteps = torch.cat(
            [part.inputs for part in parts], dim=1
        )  # what the processes see together, [A, P B, T]
        assert (microsteps[..., 0] // T).flatten().tolist() == whole


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("windows", [1, 7, 101])
def test_processes_together_cover_every_epoch_of_any_size_across_its_borders(processes: int, windows: int):
    tokens, seen = counting_tokens(windows, left_over=1), []
    for step in range(2 * windows // 24 + 1):
        specs = [make_spec(24, index=i, count=processes) for i in range(processes)]
        together = torch.cat([batch_at(tokens, step, spec).inputs for spec in specs], dim=1)
        seen += (together[..., 0] // T).flatten().tolist()
    for epoch in range(2):
        assert sorted(seen[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_hash_of_a_batch_is_of_its_tokens_and_their_places(processes: int):
    tokens = np.arange(1000, dtype=np.uint16)

    def whole_hash(tokens: np.ndarray, step: int) -> int:
        specs = [
            BatchSpec(
                block_size=4,
                batch_size=2,
                total_batch_size=64,
                seed=0,
                process_index=index,
                process_count=processes,
            )
            for index in range(processes)
        ]
        return sum(batch_hash(batch_at(tokens, step, spec), step, spec) for spec in specs) % 2**63

    alone = BatchSpec(block_size=4, batch_size=2, total_batch_size=64, seed=0)
    assert whole_hash(tokens, 3) == batch_hash(batch_at(tokens, 3, alone), 3, alone)
    assert whole_hash(tokens, 3) != whole_hash(tokens, 4)
    assert whole_hash(tokens, 3) != whole_hash(tokens[::-1], 3)
    batch = batch_at(tokens, 3, alone)
    swapped = Batch(*(part.flip(0) for part in batch))
    assert batch_hash(swapped, 3, alone) != batch_hash(batch, 3, alone)


def test_a_states_step_names_its_batch():
    """`state.step` is a tensor; the number of sequences may be beyond its range in 32 bits."""
    tokens, spec, step = counting_tokens(100), make_spec(4), 2**30
    batch = batch_at(tokens, torch.tensor(step, dtype=torch.int32), spec)
    assert batch.inputs.equal(batch_at(tokens, step, spec).inputs)


def test_tokens_that_hold_no_window_are_refused():
    with pytest.raises(UserError) as caught:
        batch_at(np.zeros(T, np.uint16), 0, make_spec(1))
    assert str(caught.value) == (
        "got 4 tokens, expected at least 5 (a window and its last target); "
        "set a smaller --model.block-size or prepare more text"
    )


def test_targets_are_the_inputs_shifted_by_one():
    tokens = np.random.default_rng(0).integers(65536, size=1001).astype(np.uint16)
    inputs, targets = batch_at(tokens, 3, make_spec(6, batch_size=3))
    assert inputs.shape == targets.shape == (2, 3, T)
    assert inputs.dtype == targets.dtype == torch.int64
    text = tokens.astype(np.int64).tolist()
    for row, target in zip(inputs.flatten(0, 1).tolist(), targets.flatten(0, 1).tolist(), strict=True):
        (start,) = (i for i in range(0, 1000, T) if text[i : i + T] == row)
        assert target == text[start + 1 : start + T + 1]


def test_a_batch_is_made_without_the_threads_of_torch():
    """They belong to the step that runs meanwhile; where others use the cores too, waiting for them takes
    ten times as long as the batch."""
    tokens, spec, threads = counting_tokens(1000), make_spec(100_000, batch_size=100_000), []

    def count_threads() -> None:
        before = len(os.listdir("/proc/self/task"))
        batch_at(tokens, 0, spec)
        threads.append(len(os.listdir("/proc/self/task")) - before)

    with ThreadPoolExecutor(1) as pool:  # whose thread has had no use for them yet
        pool.submit(count_threads).result()
    assert threads == [0]


def test_the_same_step_gives_the_same_batch_in_any_order_of_asking():
    tokens, spec = counting_tokens(100), make_spec(6)
    forwards = [batch_at(tokens, step, spec).inputs for step in range(30)]
    backwards = [batch_at(tokens, step, spec).inputs for step in reversed(range(30))]
    assert all(one.equal(other) for one, other in zip(forwards, reversed(backwards), strict=True))


@pytest.mark.parametrize(
    ("tokens", "windows"), [(0, 0), (1, 0), (T, 0), (T + 1, 1), (2 * T, 1), (2 * T + 1, 2)]
)
def test_a_window_needs_its_last_target(tokens: int, windows: int):
    assert window_count(tokens, T) == windows


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 1023, 1024, 1025, 65537]
)
def test_permute_hits_everything_below_n_once(n: int):
    for key in (0, 1, 2**64 - 1):
        permuted = permute(np.arange(n, dtype=np.uint64), n, np.uint64(key))
        assert np.array_equal(np.sort(permuted), np.arange(n, dtype=np.uint64))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 2**40))
def test_every_epoch_of_every_seed_is_a_permutation(n: int, seed: int, epoch: int):
    assert sorted(epoch_order(n, seed=seed, epoch=epoch)) == list(range(n))


def test_a_trillion_windows_need_no_table():
    n = 10**12
    permuted = permute(np.arange(10_000, dtype=np.uint64), n, np.uint64(5))
    assert len(set(permuted.tolist())) == 10_000
    assert permuted.max() < n


@pytest.mark.parametrize("n", [1000, 1024, 4097])
def test_an_epoch_has_no_stride(n: int):
    steps = np.diff(epoch_order(n)) % n
    # n draws of n values: the commonest comes about ln n / ln ln n times, about 4; an affine order gives n
    assert np.bincount(steps).max() <= 10


@pytest.mark.parametrize("n", [1000, 1024, 4097])
def test_windows_travel_as_far_as_in_a_uniform_permutation(n: int):
    moved = np.abs(np.asarray(epoch_order(n)) - np.arange(n)).mean() / n
    # a uniform permutation has mean 1/3 and deviation sqrt(2/45/n), below 0.007: five of them
    assert abs(moved - 1 / 3) < 0.035


@pytest.mark.parametrize("epochs", [400])
def test_every_window_comes_first_equally_often(epochs: int):
    n = 8
    firsts = np.bincount([epoch_order(n, epoch=epoch)[0] for epoch in range(epochs)], minlength=n)
    chi_squared = float(((firsts - epochs / n) ** 2 / (epochs / n)).sum())
    assert chi_squared < 24.3  # 7 degrees of freedom: one seed in a thousand is beyond, and this one is fixed


def test_the_hash_is_that_of_splitmix64():
    """The first numbers of the generator with the seed 0, as its author published them."""
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_half_the_bits_of_the_hash_turn_when_one_bit_of_its_input_does():
    x = np.arange(1000, dtype=np.uint64)
    for bit in range(64):
        turned = np.bitwise_count(mix64(x) ^ mix64(x ^ np.uint64(1 << bit))).mean()
        assert 31 < turned < 33  # the mean of 64,000 fair bits has a deviation of 0.13 here


# The files


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.bin"
    np.random.default_rng(0).integers(50257, size=100_003).astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize("reader", [MappedTokens, PreadTokens])
@pytest.mark.parametrize(
    "window", [slice(0, 1), slice(0, 100_003), slice(99_990, 200_000), slice(5, 5), slice(-3, None)]
)
def test_a_file_reads_as_the_array_it_holds(token_file: Path, reader: type, window: slice):
    expected, tokens = np.fromfile(token_file, dtype="<u2"), reader(token_file)
    assert len(tokens) == len(expected)
    assert tokens[window].dtype == expected.dtype
    assert np.array_equal(tokens[window], expected[window])


def test_mapped_pages_that_were_handed_back_are_read_again(token_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "RELEASE_BYTES", 1)
    expected, tokens = np.fromfile(token_file, dtype="<u2"), MappedTokens(token_file)
    for start in (0, 50_000, 0):
        assert np.array_equal(tokens[start : start + 9], expected[start : start + 9])


def test_a_file_that_cannot_be_mapped_is_read_with_pread(token_file: Path, monkeypatch: pytest.MonkeyPatch):
    def no_device(*args, **kwargs):
        raise OSError(19, "No such device")  # what mmap says on some network file systems

    assert isinstance(open_tokens(token_file), MappedTokens)
    monkeypatch.setattr(mmap, "mmap", no_device)
    tokens = open_tokens(token_file)
    assert isinstance(tokens, PreadTokens)
    assert np.array_equal(tokens[7:19], np.fromfile(token_file, dtype="<u2")[7:19])


@pytest.mark.parametrize("order", ["in a row", "at random"])
def test_resident_memory_stays_flat_while_a_large_file_is_read(tmp_path: Path, order: str):
    path, size, windows = tmp_path / "train.bin", 300 << 20, 10_000
    with path.open("wb") as file:
        file.truncate(size)  # sparse: no disk is used, but every page that is read is resident
    tokens = MappedTokens(path)
    length = len(tokens) // windows
    starts = np.arange(windows) if order == "in a row" else np.random.default_rng(0).permutation(windows)
    tokens[:length]
    this = psutil.Process()
    before, peak = this.memory_info().rss, 0
    for start in starts.tolist():
        tokens[start * length : (start + 1) * length]
        peak = max(peak, this.memory_info().rss)
    # pages go back after 64 MiB; half as much again for what the rest of the process does meanwhile
    assert peak - before < 96 << 20


@pytest.mark.parametrize("reader", [MappedTokens, PreadTokens])
def test_a_file_cut_while_in_use_is_reported(token_file: Path, reader: type):
    tokens = reader(token_file)
    with token_file.open("r+b") as file:
        file.truncate(20)
    with pytest.raises(UserError, match=rf"^{re.escape(str(token_file))} ends at byte 20, .* was it cut"):
        tokens[5:15]


def test_the_fingerprint_is_the_same_however_the_tokens_are_read(token_file: Path):
    array = np.fromfile(token_file, dtype="<u2")
    assert fingerprint(MappedTokens(token_file)) == fingerprint(PreadTokens(token_file)) == fingerprint(array)


def test_the_fingerprint_of_a_small_file_sees_every_token(token_file: Path):
    array = np.fromfile(token_file, dtype="<u2")
    for position in (0, 50_001, len(array) - 1):
        changed = array.copy()
        changed[position] ^= 1
        assert fingerprint(changed) != fingerprint(array)
    assert fingerprint(array[:-1]) != fingerprint(array)


# Reading ahead


def test_prefetch_yields_what_direct_calls_return():
    tokens, spec = counting_tokens(100), make_spec(6)
    for steps in (range(0), range(3, 4), range(5), range(2, 11, 3)):
        ahead = list(prefetch(lambda step: batch_at(tokens, step, spec), steps, CPU))
        direct = [batch_at(tokens, step, spec) for step in steps]
        assert len(ahead) == len(direct)
        assert all(
            a.inputs.equal(d.inputs) and a.targets.equal(d.targets)
            for a, d in zip(ahead, direct, strict=True)
        )


def test_prefetch_reads_the_next_batch_while_this_one_is_used():
    started = [threading.Event() for _ in range(3)]

    def read(step: int) -> Batch:
        started[step].set()
        return Batch(torch.tensor([[[step]]]), torch.tensor([[[step]]]))

    batches = prefetch(read, range(3), CPU)
    next(batches)
    assert started[1].wait(timeout=10)
    assert not started[2].is_set()  # one ahead, not all of them
    batches.close()


def test_prefetch_raises_the_error_of_the_reader_at_its_step():
    def read(step: int) -> Batch:
        if step == 1:
            raise UserError("the disk is gone")
        return Batch(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64))

    batches = prefetch(read, range(3), CPU)
    next(batches)
    with pytest.raises(UserError, match=r"^the disk is gone$"):
        next(batches)


# What is wrong with a file


def test_a_missing_file_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        open_tokens(tmp_path / "none" / "train.bin")
    assert str(caught.value) == (
        f"no token file at {tmp_path}/none/train.bin; set --data.path to a folder with train.bin and "
        "val.bin, or make one with python -m nanogpt.prepare SOURCE --out DIR"
    )


def test_a_file_in_the_place_of_the_folder_is_a_missing_file(token_file: Path):
    with pytest.raises(UserError, match=r"^no token file at .*/train\.bin/train\.bin; set --data\.path"):
        open_tokens(token_file / "train.bin")


def test_a_folder_in_the_place_of_the_file_is_a_missing_file(tmp_path: Path):
    (tmp_path / "train.bin").mkdir()
    with pytest.raises(UserError, match=r"^no token file at .*/train\.bin; set --data\.path"):
        open_tokens(tmp_path / "train.bin")


def test_an_empty_file_is_refused(tmp_path: Path):
    path = tmp_path / "train.bin"
    path.touch()
    with pytest.raises(UserError) as caught:
        open_tokens(path)
    assert str(caught.value) == (
        f"{path} is empty, expected uint16 tokens; prepare it again with python -m nanogpt.prepare, "
        "and with a --val-fraction that leaves documents for both files"
    )


def test_an_odd_number_of_bytes_is_refused(tmp_path: Path):
    path = tmp_path / "train.bin"
    path.write_bytes(bytes(1235))
    with pytest.raises(UserError) as caught:
        open_tokens(path)
    assert str(caught.value) == (
        f"{path} has an odd number of bytes (1,235), expected two for each token; "
        "it was cut or is not a token file: prepare it again with python -m nanogpt.prepare"
    )


def test_a_file_without_permission_is_refused(token_file: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")  # root may read everything, so no mode would do

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError) as caught:
        open_tokens(token_file)
    assert str(caught.value) == (
        f"no permission to read {token_file}; expected a readable file: change its mode or owner"
    )


PATH = Path("data/train.bin")


def test_a_file_shorter_than_a_window_is_refused():
    with pytest.raises(UserError) as caught:
        check_tokens(np.zeros(1024, np.uint16), PATH, vocab_size=9, block_size=1024, max_token_id=None)
    assert str(caught.value) == (
        "data/train.bin has 1,024 tokens, expected at least 1,025 (a window and its last target); "
        "set a smaller --model.block-size or prepare more text"
    )


@pytest.mark.parametrize("max_token_id", [None, 70])
@pytest.mark.parametrize("position", [0, 1234, 4999])
def test_a_token_beyond_the_vocabulary_is_named_with_its_position(
    position: int, max_token_id: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "RELEASE_BYTES", 2000)  # so that the file is read in five parts
    tokens = np.full(5000, 64, np.uint16)
    tokens[position] = 65
    with pytest.raises(UserError) as caught:
        check_tokens(tokens, PATH, vocab_size=65, block_size=8, max_token_id=max_token_id)
    assert str(caught.value) == (
        f"data/train.bin has token id 65 at position {position:,}, expected ids below 65; "
        "prepare it with this vocabulary's tokenizer or set --model.vocab-size"
    )


@pytest.mark.parametrize("wide", [np.uint32, np.int64])
def test_ids_of_four_or_eight_bytes_are_not_taken_for_twice_as_many(wide: type):
    tokens = np.arange(1, 50, dtype=wide).view(np.uint16)
    with pytest.raises(UserError) as caught:
        check_tokens(tokens, PATH, vocab_size=65, block_size=8, max_token_id=None)
    assert str(caught.value) == (
        "data/train.bin begins with a 0 at every second position, as numbers of four or eight bytes do, "
        'expected raw uint16; write it with numpy\'s .astype("uint16").tofile'
    )


def test_one_window_of_the_largest_id_of_the_vocabulary_is_fine():
    check_tokens(np.full(9, 64, np.uint16), PATH, vocab_size=65, block_size=8, max_token_id=None)


def test_a_manifest_saves_reading_the_file():
    class Unread(np.ndarray):
        def __getitem__(self, window):
            raise AssertionError("read")

    check_tokens(np.zeros(100, np.uint16).view(Unread), PATH, vocab_size=65, block_size=8, max_token_id=64)


def test_a_total_batch_that_does_not_divide_names_the_multiple():
    with pytest.raises(UserError) as caught:
        BatchSpec(block_size=1024, batch_size=12, total_batch_size=524_288, seed=0, process_count=8)
    assert str(caught.value) == (
        "a total batch of 524,288 tokens does not divide into microsteps of 98,304 "
        "(8 devices x 12 sequences x 1024 tokens); "
        "set --data.total-batch-size to a multiple of 98,304 or change --data.batch-size"
    )


def test_a_total_batch_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"^a total batch of 0 tokens does not divide"):
        BatchSpec(block_size=4, batch_size=1, total_batch_size=0, seed=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 0}, "block_size is 0, expected at least 1"),
        ({"batch_size": -2}, "batch_size is -2, expected at least 1"),
        ({"process_count": 0}, "process_count is 0, expected at least 1"),
        ({"process_index": -1}, "process_index is -1, expected 0 to 1 for 2 processes"),
        ({"process_index": 2}, "process_index is 2, expected 0 to 1 for 2 processes"),
    ],
)
def test_a_batch_of_no_sequence_or_no_process_is_refused(wrong: dict[str, int], message: str):
    sizes = dict(block_size=4, batch_size=1, total_batch_size=64, seed=0, process_count=2)
    with pytest.raises(UserError) as caught:
        BatchSpec(**(sizes | wrong))
    assert str(caught.value) == message


def test_a_step_before_the_first_has_no_batch():
    spec = BatchSpec(block_size=4, batch_size=1, total_batch_size=64, seed=0)
    with pytest.raises(UserError) as caught:
        batch_at(np.arange(100, dtype=np.uint16), -1, spec)
    assert str(caught.value) == "got step -1, expected at least 0"


def test_accumulation_follows_from_the_batch_and_the_processes():
    spec = BatchSpec(block_size=1024, batch_size=16, total_batch_size=524_288, seed=0, process_count=8)
    assert (spec.accumulation, spec.sequences) == (4, 512)


def test_a_folder_of_nanogpt_has_no_manifest(tmp_path: Path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("written", ["[]", '{"tokens": {"train": 1}}', '{"tokens": 1, "max_token_id": 1}'])
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, written: str):
    (tmp_path / "manifest.json").write_text(written)
    with pytest.raises(UserError, match=r"manifest\.json is not what nanogpt\.prepare writes; prepare the"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 200_000])
def test_a_broken_manifest_is_refused(text: str, tmp_path: Path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(
        UserError, match=r"manifest\.json cannot be read \(.*\); prepare the folder again or remove"
    ):
        read_manifest(tmp_path)
