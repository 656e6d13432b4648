"""What was saved comes back bit for bit, whatever happens in between, or one sentence says why not."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nanogpt import tree
from nanogpt.checkpoint import Checkpointer, load_params
from nanogpt.errors import UserError

METADATA = {"config": {"n_layer": 2, "betas": [0.9, 0.95]}, "data": "sha256:00"}


class Moments(NamedTuple):
    count: Tensor
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]


class State(NamedTuple):
    step: Tensor
    params: dict[str, Tensor]
    opt_state: tuple[Any, ...]


def make_state(step: int, *, width: int = 4) -> State:
    generator = torch.Generator().manual_seed(step)

    def params() -> dict[str, Tensor]:
        shapes = {"wte.weight": (8, width), "h.0.ln_1.bias": (width,)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    moments = Moments(torch.tensor(step, dtype=torch.int32), params(), params())
    return State(torch.tensor(step), params(), ((), (moments,)))


def raw_bytes(leaf: Tensor) -> Tensor:
    return leaf.contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: Any, other: Any) -> bool:
    """Whether two trees have the same names, shapes, dtypes and bytes; NaN equals itself."""
    ours, theirs = tree.paths(one), tree.paths(other)
    return not tree.diff(one, other) and all(raw_bytes(ours[k]).equal(raw_bytes(theirs[k])) for k in theirs)


def flip_a_bit(checkpoint: Path, values: Tensor) -> None:
    """Changes the last bit of the first of `values`, which lie in a file of the checkpoint as they are."""
    wanted = raw_bytes(values).numpy().tobytes()
    [file] = [file for file in checkpoint.glob("state/**/d/*") if wanted in file.read_bytes()]
    flipped = bytes([wanted[0] ^ 1]) + wanted[1:]
    file.write_bytes(file.read_bytes().replace(wanted, flipped))


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    opened = Checkpointer(tmp_path / "checkpoints")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory after saves at steps 1 to 4, with validation losses 3, 1, none and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    saving = Checkpointer(directory)
    for step, val_loss in enumerate([3.0, 1.0, None, 2.0], start=1):
        saving.save(step, make_state(step), metadata=METADATA | {"step": step}, val_loss=val_loss)
    saving.close()
    return directory


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """`trained`, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy")


# What is saved, and what comes back.


def test_a_state_comes_back_bit_for_bit_in_its_structure(trained: Path) -> None:
    restored = Checkpointer(trained).restore(4, make_state(0))
    assert isinstance(restored, State)
    assert isinstance(restored.opt_state[1][0], Moments)
    assert same_bits(restored, make_state(4))


@pytest.mark.parametrize(
    "leaf",
    [
        torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        torch.tensor([2**62 + 1, -1]),
        torch.tensor([True, False]),
        torch.tensor([1.0, 1e-40, -3.0], dtype=torch.bfloat16),
        torch.tensor(-2.0, dtype=torch.bfloat16),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.zeros(1).expand(5),
    ],
    ids=["special floats", "int64", "bool", "bfloat16", "0-d bfloat16", "transposed", "expanded"],
)
def test_leaves_of_every_kind_come_back_bit_for_bit(checkpointer: Checkpointer, leaf: Tensor) -> None:
    checkpointer.save(1, {"leaf": leaf}, metadata={})
    checkpointer.wait()
    assert same_bits(checkpointer.restore(1, {"leaf": torch.empty_like(leaf)}), {"leaf": leaf})


def test_a_state_may_be_overwritten_once_save_returns(checkpointer: Checkpointer) -> None:
    state = make_state(1)
    checkpointer.save(1, state, metadata={})
    for leaf in tree.leaves(state):
        leaf.zero_()
    checkpointer.wait()
    assert same_bits(checkpointer.restore(1, state), make_state(1))


def test_save_returns_before_the_checkpoint_is_finished(checkpointer: Checkpointer, tmp_path: Path) -> None:
    checkpointer.save(1, {"large": torch.zeros(16_000_000)}, metadata={})
    assert Checkpointer(tmp_path / "checkpoints").latest() is None
    checkpointer.wait()
    assert Checkpointer(tmp_path / "checkpoints").latest() == 1


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda checkpointer: checkpointer.latest(), 1),
        (lambda checkpointer: checkpointer.best(), 1),
        (lambda checkpointer: checkpointer.metadata(1), {"a": 1}),
        (lambda checkpointer: len(checkpointer.restore(1, {"large": torch.ones(4_000_000)})), 1),
    ],
)
def test_what_has_just_been_saved_can_be_read(
    read: Callable[[Checkpointer], Any], expected: Any, checkpointer: Checkpointer
) -> None:
    checkpointer.save(1, {"large": torch.zeros(4_000_000)}, metadata={"a": 1}, val_loss=1.0)
    assert read(checkpointer) == expected


def test_params_and_metadata_are_read_without_the_optimizer_or_its_config(trained: Path) -> None:
    params, metadata = load_params(trained)
    assert same_bits(params, make_state(4).params)
    assert metadata == METADATA | {"step": 4}
    assert same_bits(load_params(trained, 2)[0], make_state(2).params)


def test_what_jax_wrote_in_shards_is_read_whole(tmp_path: Path) -> None:
    import jax
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        shards = {"params/w": jax.numpy.arange(6.0).reshape(2, 3)}
        items = {"state": ocp.args.PyTreeSave(shards), "metadata": ocp.args.JsonSave(METADATA)}
        manager.save(1, args=ocp.args.Composite(**items))
    assert same_bits(load_params(tmp_path)[0], {"w": torch.arange(6.0).reshape(2, 3)})


def test_what_was_saved_before_arrays_had_checksums_is_read(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tensors = make_state(1).params
    arrays = {f"params/{name}": leaf.numpy() for name, leaf in tensors.items()}
    with ocp.CheckpointManager(tmp_path) as manager:  # which writes zarr's version 2, as we did
        items = {"state": ocp.args.PyTreeSave(arrays), "metadata": ocp.args.JsonSave(METADATA)}
        manager.save(1, args=ocp.args.Composite(**items))
    assert same_bits(load_params(tmp_path)[0], tensors)


def test_metadata_is_of_the_moment_of_saving(checkpointer: Checkpointer) -> None:
    metadata = {"tokens": [1]}
    checkpointer.save(1, make_state(1), metadata=metadata)
    metadata["tokens"].append(2)
    checkpointer.wait()
    assert checkpointer.metadata(1) == {"tokens": [1]}


# Which checkpoints there are.


def test_the_last_two_and_the_best_are_kept(trained: Path) -> None:
    assert steps_in(trained) == ["2", "3", "4"]


def test_latest_is_the_newest_and_best_the_lowest_loss(trained: Path) -> None:
    assert Checkpointer(trained).latest() == 4
    assert Checkpointer(trained).best() == 2


def test_the_best_survives_a_restart(copy: Path) -> None:
    restarted = Checkpointer(copy, keep=1)
    restarted.save(5, make_state(5), metadata={}, val_loss=float("nan"))
    restarted.save(6, make_state(6), metadata={}, val_loss=1.5)
    restarted.close()
    assert steps_in(copy) == ["2", "6"]
    assert restarted.best() == 2


def test_of_equal_losses_the_newest_is_the_best(checkpointer: Checkpointer) -> None:
    for step in (1, 2):
        checkpointer.save(step, make_state(step), metadata={}, val_loss=1.0)
    checkpointer.wait()
    assert checkpointer.best() == 2


def test_of_equal_losses_the_newest_is_kept(checkpointer: Checkpointer, tmp_path: Path) -> None:
    for step, val_loss in enumerate([1.0, 1.0, 2.0, 2.0], start=1):
        checkpointer.save(step, make_state(step), metadata={}, val_loss=val_loss)
    checkpointer.wait()
    assert steps_in(tmp_path / "checkpoints") == ["2", "3", "4"]


def test_a_loss_that_is_not_a_number_is_never_the_best(checkpointer: Checkpointer) -> None:
    checkpointer.save(1, make_state(1), metadata={}, val_loss=float("nan"))
    checkpointer.wait()
    assert checkpointer.best() is None


def test_a_checkpoint_whose_deletion_was_interrupted_is_not_in_the_way(copy: Path) -> None:
    (copy / "3" / "metrics").mkdir()
    assert Checkpointer(copy).best() == 2
    restarted = Checkpointer(copy)
    restarted.save(5, make_state(5), metadata={}, val_loss=4.0)
    restarted.close()
    assert steps_in(copy) == ["2", "4", "5"]


def test_nothing_is_created_before_the_first_save(tmp_path: Path) -> None:
    unused = Checkpointer(tmp_path / "checkpoints")
    unused.check(make_state(0))
    assert unused.latest() is None
    assert unused.best() is None
    unused.close()
    assert steps_in(tmp_path) == []


# Quietly, without running what is in the files, and whatever interrupts it.


class Interrupted(NamedTuple):
    directory: Path
    noticed: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def interrupted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A process that read a copy of `trained`, saved step 5, and was killed as step 6 got its final name."""
    program = """
        import json, os, signal, sys
        from pathlib import Path

        import torch

        from nanogpt.checkpoint import Checkpointer, load_params

        directory, noted = Path(sys.argv[1]), Path(sys.argv[2])
        checkpointer, unpickled = Checkpointer(directory), []

        def notice(event, arguments):
            if event.startswith("pickle."):
                unpickled.append(event)
            if event == "os.rename" and str(arguments[1]).endswith("/6"):
                os.kill(os.getpid(), signal.SIGKILL)

        steps = checkpointer.latest(), checkpointer.best(), checkpointer.metadata(4)["step"]
        jax_imported = "jax" in sys.modules
        params, _ = load_params(directory)
        sys.addaudithook(notice)
        load_params(directory)
        noted.write_text(json.dumps({"steps": steps, "jax imported": jax_imported, "unpickled": unpickled}))
        checkpointer.save(5, {"params": params}, metadata={}, val_loss=1.0)
        checkpointer.save(6, {"params": params}, metadata={}, val_loss=0.5)
        checkpointer.close()
    """
    folder = tmp_path_factory.mktemp("interrupted")
    directory, noted = shutil.copytree(trained, folder / "checkpoints"), folder / "noted.json"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), directory, noted],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return Interrupted(directory, json.loads(noted.read_text()), done.stdout + done.stderr)


def test_steps_and_metadata_are_read_without_importing_jax(interrupted: Interrupted) -> None:
    assert interrupted.noticed["steps"] == [4, 2, 4]
    assert not interrupted.noticed["jax imported"]


def test_reading_unpickles_nothing(interrupted: Interrupted) -> None:
    assert interrupted.noticed["unpickled"] == []


def test_saving_and_reading_print_nothing(interrupted: Interrupted) -> None:
    assert interrupted.printed == ""


def test_arrays_that_fail_beside_the_one_that_is_raised_are_not_logged(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_params(trained)  # silences what can be logged at any time after a failed read
    for message in ("Task exception was never retrieved [tensorstore_spec='{}']", "something else"):
        logging.getLogger("asyncio").error(message)
    assert caplog.messages == ["something else"]


def test_a_save_that_is_killed_leaves_the_ones_before_it(interrupted: Interrupted, tmp_path: Path) -> None:
    directory = shutil.copytree(interrupted.directory, tmp_path / "copy")
    assert len(set(steps_in(directory)) - {"2", "4", "5"}) == 1  # what was being written
    restarted = Checkpointer(directory)
    assert restarted.latest() == 5
    assert restarted.best() == 5
    assert same_bits(restarted.restore(5, {"params": make_state(0).params}), {"params": make_state(4).params})
    restarted.save(7, make_state(7), metadata={})
    restarted.close()
    assert steps_in(directory) == ["5", "7"]
    assert same_bits(restarted.restore(7, make_state(0)), make_state(7))


@pytest.mark.parametrize(
    "notice",
    [
        Checkpointer.wait,
        lambda checkpointer: checkpointer.save(3, make_state(3)),
        Checkpointer.latest,
        Checkpointer.close,
    ],
    ids=["wait", "save", "latest", "close"],
)
def test_a_failed_save_says_so_once_and_the_next_one_works(
    checkpointer: Checkpointer, tmp_path: Path, notice: Callable[[Checkpointer], object]
) -> None:
    checkpointer.save(1, make_state(1), metadata={})
    checkpointer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        checkpointer.save(2, {"large": torch.zeros(100_000)}, metadata={})
        with pytest.raises(
            UserError, match=r"failed \(earlier ones are whole\): .*File too large.*; make room"
        ):
            notice(checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpointer.latest() == 1
    if notice is Checkpointer.close:
        checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(3, make_state(3), metadata={})
    checkpointer.close()
    assert steps_in(tmp_path / "checkpoints") == ["1", "3"]


# Bad input: one sentence each.


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"w": torch.zeros(3)}, "params/w is float32[2], expected float32[3] (1 of 2 leaves differ)"),
        (
            {"w": torch.zeros(2).double()},
            "params/w is float32[2], expected float64[2] (1 of 2 leaves differ)",
        ),
        ({"v": torch.zeros(2)}, "params/v is missing (1 of 3 leaves differ)"),
        ({"w": None}, "params/w is not expected (1 of 2 leaves differ)"),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_leaf(
    checkpointer: Checkpointer, tmp_path: Path, change: dict[str, Tensor | None], sentence: str
) -> None:
    params = {"b": torch.zeros(1), "w": torch.zeros(2)}
    checkpointer.save(1, {"params": params}, metadata={})
    checkpointer.wait()
    other = {name: leaf for name, leaf in (params | change).items() if leaf is not None}
    with pytest.raises(UserError) as refused:
        checkpointer.restore(1, {"params": other})
    assert str(refused.value) == (
        f"the checkpoint of step 1 in {tmp_path}/checkpoints is of another model or optimizer: {sentence}; "
        "use the config in its metadata, or another directory"
    )


def test_a_directory_without_checkpoints_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"tokens")
    sentence = f"{tmp_path} holds no checkpoint; give a directory that a training run has saved to"
    for read in (
        lambda: load_params(tmp_path),
        lambda: Checkpointer(tmp_path).restore(1, make_state(0)),
        lambda: Checkpointer(tmp_path).metadata(1),
    ):
        with pytest.raises(UserError) as refused:
            read()
        assert str(refused.value) == sentence


def test_a_step_that_is_not_there_is_answered_with_those_that_are(trained: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_params(trained, 1)
    assert str(refused.value) == f"{trained} holds no checkpoint of step 1; choose one that it holds: 2, 3, 4"


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_that_is_not_the_newest_is_not_saved(trained: Path, step: int) -> None:
    with pytest.raises(UserError) as refused:
        Checkpointer(trained).save(step, make_state(step), metadata={})
    assert str(refused.value) == (
        f"{trained} already holds a checkpoint of step 4, expected none from step {step} on; "
        "resume from step 4 or save to another directory"
    )


@pytest.mark.parametrize("damage", ["half", "nothing", "gone"])
@pytest.mark.parametrize(
    "files", ["4/state/**/d/*", "4/state/**/manifest.ocdbt", "4/state/_METADATA", "4/metadata/*"]
)
def test_a_damaged_checkpoint_is_named_and_how_to_go_on(copy: Path, files: str, damage: str) -> None:
    for file in list(copy.glob(files)):
        content = file.read_bytes()
        file.unlink()
        if damage != "gone":
            file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.raises(UserError) as refused:
        load_params(copy)
    assert str(refused.value).startswith(f"the checkpoint of step 4 in {copy} is damaged: ")
    assert str(refused.value).endswith(f"; remove {copy}/4 to use the one before it")
    assert "\n" not in str(refused.value)
    assert "tensorstore_spec" not in str(refused.value)
    shutil.rmtree(copy / "4")
    assert same_bits(load_params(copy)[0], make_state(3).params)


@pytest.mark.parametrize("key", ["tree_metadata", "key_metadata", "value_type"])
def test_a_description_that_lacks_a_key_is_named(copy: Path, key: str) -> None:
    file = copy / "4/state/_METADATA"
    file.write_text(file.read_text().replace(f'"{key}"', f'"{key[:-1]}"'))
    with pytest.raises(UserError, match=rf"^the checkpoint of step 4 .* is damaged: '{key}' is missing; "):
        load_params(copy)


def test_a_flipped_bit_of_an_array_is_noticed(checkpointer: Checkpointer, tmp_path: Path) -> None:
    state = make_state(1, width=256)
    checkpointer.save(1, state)
    checkpointer.wait()
    flip_a_bit(tmp_path / "checkpoints/1", state.params["wte.weight"][4:])
    with pytest.raises(UserError, match=r"^the checkpoint of step 1 .* is damaged: .*params/wte\.weight"):
        load_params(tmp_path / "checkpoints")


def test_a_directory_whose_name_is_not_utf_8_is_refused_before_a_run_starts(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^checkpoints cannot be saved to '.*\\udcff', expected a name in UTF-8"
    ):
        Checkpointer(tmp_path / os.fsdecode(b"\xff")).check(make_state(0))


def test_a_file_where_the_directory_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = Checkpointer(tmp_path / "file" / "checkpoints")
    for attempt in (
        lambda: blocked.check(make_state(0)),
        lambda: blocked.save(1, make_state(1), metadata={}),
    ):
        with pytest.raises(UserError) as refused:
            attempt()
        assert str(refused.value) == (
            f"checkpoints cannot be saved to {tmp_path}/file/checkpoints: {tmp_path}/file is not a folder "
            "that you may write to; choose another directory"
        )


def test_a_directory_without_write_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def access(path: Path, mode: int) -> bool:  # as the system answers all but root, who may write everywhere
        return not (path == tmp_path and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(UserError, match="is not a folder that you may write to"):
        Checkpointer(tmp_path / "checkpoints").check(make_state(0))


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2_000_000))
    state = {"large": torch.zeros(1_000_000)}
    need = {
        "16.0 MB": lambda: Checkpointer(tmp_path).check(state),  # two, the best, and the one being written
        "4.0 MB": lambda: Checkpointer(tmp_path).save(1, state, metadata={}),
    }
    for needed, attempt in need.items():
        with pytest.raises(UserError) as refused:
            attempt()
        assert str(refused.value) == (
            f"{tmp_path} has 2.0 MB free and checkpoints need {needed}; make room or choose another directory"
        )


@pytest.mark.parametrize(("keep", "needed"), [(3, "8.0 MB"), (2, "4.0 MB"), (1, "4.0 MB")])
def test_checkpoints_that_are_there_need_no_more_room(
    trained: Path, monkeypatch: pytest.MonkeyPatch, keep: int, needed: str
) -> None:
    """Three are; at most `keep`, the best and the one being written exist at a time."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2_000_000))
    with pytest.raises(UserError, match=f"free and checkpoints need {needed};"):
        Checkpointer(trained, keep=keep).check({"large": torch.zeros(1_000_000)})


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^keeping 0 checkpoints would leave none to resume from; keep at least 1$"
    ):
        Checkpointer(tmp_path, keep=0)
