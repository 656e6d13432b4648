"""What a rank of a sharded job holds in memory, found without the job: by running the step on fake tensors.

`plan` runs init, FSDP2, forward, backward and optimizer of rank 0 with a fake process group, on tensors that
have shapes but no values, and counts every storage from its creation to its end. So it follows uneven shards,
resharding and gathering exactly as the code does them. It cannot see what torch does not allocate (the CUDA
context, buffers of NCCL and gloo) or what an allocator loses to fragmentation. The step is the eager one: a
compiled step keeps fewer activations.
"""

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import Work, batches_of, make_optimizer
from nanogpt import sharding
from nanogpt.loss import chunk_tokens_of
from nanogpt.train import init_state, make_train_step

FSDP = "torch.distributed.fsdp._fully_shard._fsdp_"
DESCRIPTION = "shapes that DTensor works out on fake tensors of its own"
KINDS = (
    ("torch.distributed.tensor._sharding_prop", "", DESCRIPTION),
    (FSDP + "collectives", "foreach_reduce", "reduce buffers"),
    (FSDP + "collectives", "foreach_all_gather", "gather buffers"),
    (FSDP + "param", "init_all_gather_outputs", "blocks, gathered"),
    ("nanogpt.loss", "chunk_loss", "logits of a chunk"),
    ("nanogpt.loss", "", "head and its gradient"),
    ("nanogpt.model", "padded_head", "head and its gradient"),
    ("nanogpt.model", "init", "parameters"),
    ("nanogpt.sharding", "place", "parameters"),
    ("nanogpt.model", "", "activations"),
    ("nanogpt.optim", "init", "moments"),
    ("nanogpt.optim", "", "update"),
    ("nanogpt.update", "", "update"),
    ("nanogpt.train", "make_loss", "head and its gradient"),
    ("nanogpt.train", "make_sharded_value_and_grad", "backward"),
)
"""(module, prefix of the name of a function or of one around it, kind): the innermost frame that matches
says what a storage is for. "backward" is gradients of activations and of whole weights."""


class Plan(NamedTuple):
    """Bytes of one rank."""

    rest: dict[str, int]
    """By kind, between two steps."""
    at_peak: dict[str, int]
    """By kind, at the moment of a step when most is held; the sum is what the device must have."""
    peak_of_kind: dict[str, int]
    """The most that is held of each kind, each at its own moment of a step."""

    @property
    def rest_bytes(self) -> int:
        return sum(self.rest.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.at_peak.values())


def plan(work: Work, shape: tuple[int, int], *, reshard_after_forward: bool = False) -> Plan:
    """Memory of rank 0 of (replicate, shard) = `shape`, whose part of a microstep is `work.batch_size`.

    Tensors are the CPU's whatever `work.device` is, which only decides how many logits exist at a time. Rank
    0 has the largest part if sizes do not divide evenly. Allocates nothing; takes tens of seconds for the xl
    size. There must be no process group yet: this makes a fake one, and destroys it.
    """
    chunk_tokens = chunk_tokens_of(work.device, work.precision)
    # The model is a copy, since its skeleton will be of fake tensors, which nobody else can use.
    work = replace(work, model=replace(work.model), device="cpu")
    optimizer = make_optimizer(work)
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_ranks(shape[0] * shape[1]))
        mesh = sharding.make_mesh("cpu", shape)  # reads ranks, which fake tensors cannot hold
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        ledger = stack.enter_context(Ledger())
        batch = batches_of(work)[0]
        state = init_state(work.model, optimizer, torch.Generator().manual_seed(0), mesh=mesh)
        step = make_train_step(
            work.model,
            optimizer,
            mesh=mesh,
            precision=work.precision,
            attention=work.attention,
            reshard_after_forward=reshard_after_forward,
            loss_chunk_tokens=chunk_tokens,
            donate=True,
            compile=False,
        )
        ledger.start_over()
        state, _ = step(state, batch)
        gc.collect()  # what only a reference cycle holds does not outlive a step
        return Plan(dict(ledger.now), ledger.at_peak, ledger.peak_of_kind)


@contextlib.contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """Makes this process rank 0 of `size` ranks whose collectives return at once and move nothing."""
    assert not dist.is_initialized(), "a fake process group cannot stand beside a real one"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages allocated within it, by kind, and keeps the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = {}
        self._known: dict[int, tuple[str, int, Any]] = {}
        self._total = 0
        self.start_over()

    def start_over(self) -> None:
        """Forgets the peaks so far."""
        self._peak, self.at_peak, self.peak_of_kind = self._total, dict(self.now), dict(self.now)

    def __enter__(self) -> "Ledger":
        # FSDP2 frees and allocates memory by resizing storages, which no torch operator shows.
        self._resize, ledger = torch.UntypedStorage.resize_, self

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            ledger._resize(storage, size)
            if storage._cdata in ledger._known:
                kind, _, reference = ledger._known[storage._cdata]
                ledger._set(storage._cdata, kind, size, reference)

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]  a method of C, which its stub lets nobody assign
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes back with local tensors
        out = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            # FSDP2 and the model describe parameters by tensors on the meta device, on real ranks too.
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or (kind := kind_of(sys._getframe(2))) == DESCRIPTION:
            return
        self._set(key, kind, storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key)))

    def _forget(self, key: int) -> None:
        kind, _, reference = self._known[key]
        self._set(key, kind, 0, reference)
        del self._known[key]

    def _set(self, key: int, kind: str, size: int, reference: Any) -> None:
        more = size - (self._known[key][1] if key in self._known else 0)
        self._known[key] = kind, size, reference
        self._total += more
        self.now[kind] = self.now.get(kind, 0) + more
        self.peak_of_kind[kind] = max(self.peak_of_kind.get(kind, 0), self.now[kind])
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, dict(self.now)


def kind_of(frame: FrameType | None) -> str:
    """What a storage made in `frame` is for, according to the innermost frame that KINDS knows."""
    while frame is not None:
        module, names = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname.split(".")
        for known, name, kind in KINDS:
            # A comprehension's frame lacks the local names of the function around it.
            if module == known and names[-1][0] != "<" and any(part.startswith(name) for part in names):
                return _finer(kind, frame)
        frame = frame.f_back
    return "other"


def _finer(kind: str, frame: FrameType) -> str:
    if kind == "reduce buffers" and "reduce_scatter_input" in frame.f_locals:
        return "gradients"  # made after the buffer that they are reduced from
    if kind == "blocks, gathered" and hasattr(frame.f_locals["self"]._module_info.module, "blocks"):
        return "embeddings, gathered in fp32"
    return kind
