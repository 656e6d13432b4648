"""Ranks save their shards and read their parts: bit for bit on any mesh, and no failure leaves one waiting.

The ranks are real processes with gloo. They fork from one that has imported everything, which takes long, and
run all jobs of this file.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanogpt import tree
from nanogpt.checkpoint import Checkpointer, load_params
from nanogpt.errors import UserError
from nanogpt.ranks import Ranks

MESHES = {2: (2,), 3: (3,), 4: (4,), 5: (2, 2), 6: (1,)}
"""The mesh that saved each step; step 1 is saved by a process that knows nothing of ranks."""
PLAIN = (2, 3)
"""The shape of a leaf that every rank has whole."""
JOB_TIMEOUT_S = 100
PRELOADED = ["torch.distributed.fsdp", "torch._dynamo", "nanogpt.orbax_edge", __name__]


class State(NamedTuple):
    step: Tensor
    params: dict[str, Tensor]
    opt_state: tuple[Any, ...]


def make_state(step: int) -> State:
    """Sizes that 2, 3 and 4 do not divide, that leave ranks without elements, and every dtype we train in."""
    generator = torch.Generator().manual_seed(step)

    def leaves() -> dict[str, Tensor]:
        even, uneven, few = (torch.randn(shape, generator=generator) for shape in ((12, 64), (7, 3), (5,)))
        uneven[0, 0], uneven[-1, -1] = float("nan"), -0.0
        one = torch.randn(1, generator=generator).bfloat16()
        plain = torch.randn(PLAIN, generator=generator)
        return dict(even=even, uneven=uneven, few=few, one=one, half=uneven.bfloat16(), plain=plain)

    return State(torch.tensor(step), leaves(), ((), (torch.tensor(step, dtype=torch.int32), leaves())))


def sharded(state: State, shape: tuple[int, ...]) -> State:
    """`state` as DTensors on a mesh of all ranks; its counts and leaves like PLAIN stay plain tensors."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placements = (Replicate(), Shard(0))[-len(shape) :]

    def place(leaf: Tensor) -> Tensor:
        is_plain = leaf.shape in ((), PLAIN)
        return leaf if is_plain else distribute_tensor(leaf, mesh, placements)

    return tree.map(place, state)


def differences(got: Any, expected: Any) -> list[str]:
    """The leaves whose names, shapes, dtypes, placements or bits on this rank differ; NaN equals itself."""
    ours, theirs = tree.paths(got), tree.paths(expected)
    return tree.diff(got, expected) + [
        name for name in theirs if described(ours[name]) != described(theirs[name])
    ]


def described(leaf: Tensor) -> tuple[Any, ...]:
    place = (leaf.device_mesh, leaf.placements, leaf.stride()) if isinstance(leaf, DTensor) else None
    part = leaf.to_local() if isinstance(leaf, DTensor) else leaf
    return place, part.shape, part.contiguous().reshape(-1).view(torch.uint8).tolist()


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refusal(action: Callable[[], object], kind: type[Exception] = UserError) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "nothing was raised"


# Processes.


def serve(jobs: Connection) -> None:
    """Run, in a process of its own, the jobs that arrive, and answer with what they return."""
    torch.set_num_threads(1)
    while True:
        job, rank, size, store, arguments = jobs.recv()
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            jobs.send(job(*arguments))
        except BaseException:
            jobs.send(traceback.format_exc())
            raise
        finally:
            dist.destroy_process_group()


class Pool:
    """Processes that are ranks, each of one number for ever: torch caches what depends on it.

    One that has been killed, or ended by a job that failed, is replaced.
    """

    def __init__(self, folder: Path):
        self._folder, self._jobs = folder, 0
        self._workers: dict[int, tuple[Any, Connection]] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()  # it imports while this process does, too

    def run(self, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `job` returned on each of `size` ranks; the exit status of those that were killed."""
        self._jobs += 1
        for rank in range(size):
            if rank not in self._workers or not self._workers[rank][0].is_alive():
                self._workers[rank] = self._start()
            store = self._folder / f"store-{self._jobs}"
            self._workers[rank][1].send((job, rank, size, store, arguments))
        return [self._answer(*self._workers[rank]) for rank in range(size)]

    def close(self) -> None:
        for process, _ in self._workers.values():
            process.kill()
            process.join()

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _answer(self, process: Any, jobs: Connection) -> Any:
        assert jobs.poll(JOB_TIMEOUT_S), "a rank hangs"
        try:
            return jobs.recv()
        except EOFError:
            process.join()
            return process.exitcode


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with closing(Pool(tmp_path_factory.mktemp("stores"))) as opened:
        yield opened


# From mesh to mesh.


def relay(directory: Path, step: int, shape: tuple[int, ...]) -> list[str]:
    """Restore the step before, compare it, and save another state."""
    with closing(Checkpointer(directory, keep=9)) as checkpointer:
        before = sharded(make_state(step - 1), shape)
        restored = checkpointer.restore(step - 1, tree.map(torch.zeros_like, before))
        checkpointer.save(step, sharded(make_state(step), shape), metadata={"step": step}, val_loss=1.0)
        return differences(restored, before)


class Relay(NamedTuple):
    directory: Path
    found: dict[int, list[Any]]


@pytest.fixture(scope="module")
def relayed(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Relay:
    """Steps 1 to 6, each restored and saved anew by the mesh of the next."""
    directory = tmp_path_factory.mktemp("relay") / "checkpoints"
    with closing(Checkpointer(directory)) as alone:
        alone.save(1, make_state(1), metadata={"step": 1})
    found = {
        step: pool.run(torch.Size(shape).numel(), relay, directory, step, shape)
        for step, shape in MESHES.items()
    }
    return Relay(directory, found)


@pytest.mark.parametrize("step", MESHES)
def test_each_mesh_reads_what_the_one_before_it_wrote_bit_for_bit(relayed: Relay, step: int) -> None:
    assert relayed.found[step] == [[]] * torch.Size(MESHES[step]).numel()


@pytest.mark.parametrize("step", MESHES)
def test_a_process_without_ranks_reads_what_ranks_wrote(relayed: Relay, step: int) -> None:
    checkpointer = Checkpointer(relayed.directory)
    expected = make_state(step)
    assert differences(checkpointer.restore(step, tree.map(torch.zeros_like, expected)), expected) == []
    params, metadata = load_params(relayed.directory, step)
    assert differences(params, expected.params) == []
    assert metadata == checkpointer.metadata(step) == {"step": step}


def test_orbax_alone_reads_what_ranks_wrote(relayed: Relay) -> None:
    import orbax.checkpoint as ocp

    arrays = ocp.PyTreeCheckpointer().restore(relayed.directory / "4" / "state")
    expected = tree.paths(make_state(4))
    assert arrays.keys() == expected.keys()
    for name, leaf in expected.items():
        assert arrays[name].tobytes() == bytes(leaf.reshape(-1).view(torch.uint8).tolist())


def written_by(folder: Path, leaf: str) -> dict[str, list[str]]:
    """The chunks of a leaf that each process has written."""
    import tensorstore as ts

    chunks = {}
    for process in sorted(folder.glob("ocdbt.process_*")):
        spec: Any = {"driver": "ocdbt", "base": f"file://{process}/"}
        keys = [key.decode() for key in ts.KvStore.open(spec).result().list().result()]
        names = [key.removeprefix(f"{leaf}/") for key in keys if key.startswith(f"{leaf}/c")]
        chunks[process.name[-1]] = sorted(names)
    return chunks


@pytest.mark.parametrize(
    ("step", "leaf", "chunks"),
    [
        (3, "params/uneven", {"0": ["c/0/0"], "1": ["c/1/0"], "2": ["c/2/0"]}),
        (4, "params/few", {"0": ["c/0"], "1": ["c/1"], "2": ["c/2"], "3": []}),
        (4, "step", {"0": ["c"], "1": [], "2": [], "3": []}),
        (4, "params/plain", {"0": ["c/0/0"], "1": [], "2": [], "3": []}),
        (5, "params/uneven", {"0": ["c/0/0"], "1": ["c/1/0"]}),
    ],
    ids=["shards", "empty shards", "a count", "a plain tensor", "replicas"],
)
def test_each_shard_is_written_once_by_the_rank_that_holds_it(
    relayed: Relay, step: int, leaf: str, chunks: dict[str, list[str]]
) -> None:
    assert written_by(relayed.directory / str(step) / "state", leaf) == chunks


def test_a_part_is_read_without_the_files_of_other_ranks(relayed: Relay, tmp_path: Path) -> None:
    from nanogpt import orbax_edge

    folder = shutil.copytree(relayed.directory / "2" / "state", tmp_path / "state")
    shutil.rmtree(folder / "ocdbt.process_1" / "d")
    first, second = ((slice(start, start + 6), slice(0, 64)) for start in (0, 6))
    read = orbax_edge.read(folder, {"params/even": first})["params/even"]
    assert torch.from_numpy(read).equal(make_state(2).params["even"][:6])
    with pytest.raises(ValueError, match="params/even"):
        orbax_edge.read(folder, {"params/even": second})


def test_a_flipped_bit_of_a_shard_is_noticed(relayed: Relay, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    folder = shutil.copytree(relayed.directory / "2" / "state", directory / "2" / "state")
    shard = make_state(2).params["even"][6:].numpy().tobytes()
    [file] = [file for file in folder.glob("ocdbt.process_*/d/*") if shard in file.read_bytes()]
    file.write_bytes(file.read_bytes().replace(shard, bytes([shard[0] ^ 1]) + shard[1:]))
    with pytest.raises(UserError, match=r"^the checkpoint of step 2 .* is damaged: .*params/even"):
        load_params(directory, 2)


def fsdp(directory: Path) -> list[str]:
    """Save what fully_shard made of a module, and restore it."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = nn.Linear(2, 5)
    fully_shard(module)
    params = dict(module.named_parameters())
    with closing(Checkpointer(directory)) as checkpointer:
        checkpointer.save(1, {"params": params}, metadata={})
        checkpointer.wait()
        restored = checkpointer.restore(1, {"params": tree.map(torch.zeros_like, params)})
    return differences(restored["params"], params)


def test_what_fully_shard_made_comes_back_sharded_and_whole(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, fsdp, tmp_path) == [[], []]
    torch.manual_seed(0)
    assert differences(load_params(tmp_path)[0], dict(nn.Linear(2, 5).named_parameters())) == []


# While training goes on, and together.


def train_meanwhile(directory: Path) -> tuple[bool, int | None, float]:
    state = sharded(make_state(0)._replace(params={"large": torch.ones(16_000_000)}), (2,))
    with closing(Checkpointer(directory)) as checkpointer:
        checkpointer.save(1, state, metadata={})
        state.params["large"].to_local().zero_()
        is_finished, total = (directory / "1").exists(), torch.ones(1)
        for _ in range(200):
            dist.all_reduce(total)
            total /= 2
        checkpointer.wait()
        return is_finished, checkpointer.latest(), total.item()


def test_save_returns_at_once_and_leaves_the_caller_its_collectives(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, train_meanwhile, tmp_path) == [(False, 1, 1.0)] * 2
    assert load_params(tmp_path)[0]["large"].equal(torch.ones(16_000_000))


def keep_one(directory: Path) -> tuple[Any, ...]:
    rank = dist.get_rank()
    with closing(Checkpointer(directory, keep=1)) as checkpointer:
        checkpointer.check(sharded(make_state(0), (2,)))
        for step, val_loss in enumerate([3.0, 1.0, 2.0, 2.0], start=1):
            state = sharded(make_state(step), (2,))
            checkpointer.save(step, state, metadata={"rank": rank}, val_loss=val_loss + 9 * rank * step)
        checkpointer.wait()
        return checkpointer.latest(), checkpointer.best(), checkpointer.metadata(4)


def test_rank_0_decides_what_is_kept_and_all_ranks_see_the_same(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, keep_one, tmp_path) == [(4, 2, {"rank": 0})] * 2
    assert steps_in(tmp_path) == ["2", "4"]


# Failures, on all ranks.


@contextmanager
def small_files(here: bool) -> Iterator[None]:
    """No file may grow beyond 50 kB in this process: a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]) if here else limits)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_on(full_rank: int, directory: Path) -> tuple[str, int | None]:
    with closing(Checkpointer(directory)) as checkpointer:
        checkpointer.save(1, sharded(make_state(1), (2,)), metadata={})
        checkpointer.wait()
        large = sharded(make_state(2)._replace(params={"large": torch.zeros(100_000)}), (2,))
        with small_files(here=dist.get_rank() == full_rank):
            checkpointer.save(2, large, metadata={})
            sentence = refusal(checkpointer.wait)
        after = checkpointer.latest()
        checkpointer.save(3, sharded(make_state(3), (2,)), metadata={})
    return sentence, after


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all_and_the_next_save_works(
    pool: Pool, tmp_path: Path, full_rank: int
) -> None:
    (one, after_one), (other, after_other) = pool.run(2, fail_on, full_rank, tmp_path)
    assert one == other
    assert one.startswith(
        f"saving a checkpoint to {tmp_path} failed (earlier ones are whole): rank {full_rank}: "
    )
    assert "File too large" in one
    assert after_one == after_other == 1
    assert steps_in(tmp_path) == ["1", "3"]


def refuse(directory: Path) -> list[str]:
    other_shape, shape = torch.zeros(5, 3), (2,)
    with closing(Checkpointer(directory)) as checkpointer:
        state = sharded(make_state(0), shape)
        params = state.params | sharded(State(other_shape, {"uneven": other_shape}, ()), shape).params
        twice = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2, 1)), [Shard(0), Shard(0)])
        return [
            refusal(lambda: checkpointer.restore(6, state._replace(params=params))),
            refusal(lambda: checkpointer.restore(7, state)),
            refusal(lambda: checkpointer.metadata(7)),
            refusal(lambda: checkpointer.save(6, state, metadata={})),
            refusal(lambda: checkpointer.save(7, {"p": twice}, metadata={}), ValueError),
        ]


def test_every_rank_gets_the_sentence(pool: Pool, relayed: Relay) -> None:
    one, other = pool.run(2, refuse, relayed.directory)
    directory = relayed.directory
    assert one == other
    assert one[0] == (
        f"the checkpoint of step 6 in {directory} is of another model or optimizer: params/uneven is "
        "float32[7, 3], expected float32[5, 3] (1 of 14 leaves differ); use the config in its metadata, or "
        "another directory"
    )
    missing = f"{directory} holds no checkpoint of step 7; choose one that it holds: 1, 2, 3, 4, 5, 6"
    assert one[1:3] == [missing, missing]
    assert one[3].startswith(f"{directory} already holds a checkpoint of step 6")
    assert one[4] == "a leaf placed as (Shard(dim=0), Shard(dim=0)) cannot be saved or restored in shards"


def be_odd() -> list[str]:
    """What all ranks raise where some do: an OSError on rank 1, two UserErrors, and both kinds."""
    ranks, rank = Ranks(), dist.get_rank()

    def fail(*errors: Exception | None) -> None:
        if error := errors[rank]:
            raise error

    rounds = [
        (None, FileNotFoundError(2, "gone\nfor good")),
        (UserError("mine"), UserError("yours")),
        (OSError("full"), UserError("yours")),
    ]
    return [refusal(lambda errors=errors: ranks.agree(lambda: fail(*errors)), Exception) for errors in rounds]


def test_the_error_of_the_first_rank_that_fails_is_raised_on_all(pool: Pool) -> None:
    assert pool.run(2, be_odd) == [["rank 1: [Errno 2] gone", "mine", "rank 0: full"]] * 2


def fall_silent() -> str:
    """Rank 0 waits for a rank that computes something else."""
    ranks = Ranks(timeout_s=5)
    sentence = "" if dist.get_rank() else refusal(lambda: ranks.agree(lambda: None), RuntimeError)
    dist.barrier()
    return sentence


def test_a_rank_that_hangs_is_not_waited_for_for_ever(pool: Pool) -> None:
    assert pool.run(2, fall_silent)[0].startswith(
        "rank 0 did not hear from all 2 ranks: one has ended, or hung for 5 s; look at the end of each "
        "rank's log, and resume (gloo: "
    )


# Killed.


def save_and_die(victim: int, directory: Path) -> tuple[str, bool]:
    """Save step 1, and step 2 until `victim` is killed: rank 0 as the step gets its name, rank 1 between
    writing its shards and saying so.
    """

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        is_named = event == "os.rename" and str(arguments[1]).endswith("/2")
        is_written = event in ("os.scandir", "os.listdir") and "/2.shards-" in str(arguments[0])
        if is_named or (is_written and victim == 1):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpointer = Checkpointer(directory)
    checkpointer.save(1, sharded(make_state(1), (3,)), metadata={})
    checkpointer.wait()
    if dist.get_rank() == victim:
        sys.addaudithook(die)
    checkpointer.save(2, sharded(make_state(2), (3,)), metadata={})
    start = time.monotonic()
    sentence = refusal(checkpointer.close, RuntimeError)
    return sentence, time.monotonic() - start < 30


def resume(directory: Path, shape: tuple[int, ...]) -> tuple[int | None, list[str]]:
    with closing(Checkpointer(directory)) as checkpointer:
        latest, state = checkpointer.latest(), sharded(make_state(1), shape)
        restored = checkpointer.restore(1, tree.map(torch.zeros_like, state))
        checkpointer.save(2, sharded(make_state(2), shape), metadata={})
        return latest, differences(restored, state)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_killed_in_a_save_ends_the_others_and_another_number_of_them_goes_on(
    pool: Pool, tmp_path: Path, victim: int
) -> None:
    answers = pool.run(3, save_and_die, victim, tmp_path)
    assert answers.pop(victim) == -signal.SIGKILL
    for sentence, is_quick in answers:
        assert "did not hear from all 3 ranks" in sentence
        assert is_quick
    assert "1" in steps_in(tmp_path)
    assert "2" not in steps_in(tmp_path)
    assert victim == 1 or len(steps_in(tmp_path)) > 1  # what was being written, which rank 1 leaves to rank 0
    assert pool.run(2, resume, tmp_path, (2,)) == [(1, [])] * 2
    assert steps_in(tmp_path) == ["1", "2"]
    restored = Checkpointer(tmp_path).restore(2, tree.map(torch.zeros_like, make_state(0)))
    assert differences(restored, make_state(2)) == []
