"""Training steps on meshes of real processes with gloo: a program that runs all layouts side by side and
keeps what each rank saw, for test_sharding.py.

It imports torch once and forks the ranks.
"""

import functools
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt import optim, sharding, tree
from nanogpt.data import Batch, BatchSpec, batch_at
from nanogpt.errors import UserError
from nanogpt.evals import validation_batches, validation_loss, validation_windows
from nanogpt.model import GPT2Config, Params, fold_in
from nanogpt.optim import Transform
from nanogpt.train import TrainState, init_state, make_eval_step, make_train_step, make_value_and_grad

STEPS, SEQUENCES = 6, 12
CONFIG = GPT2Config(vocab_size=65, block_size=9, n_layer=2, n_head=2, n_embd=14)
"""Nothing divides by 3 or 4, and the last of four ranks has none of the nine positions."""
TOKENS = (np.cumsum(np.random.default_rng(0).integers(1, 3, 2000)) % CONFIG.vocab_size).astype("<u2")


class Layout(NamedTuple):
    """How processes share the state."""

    replicate: int
    shard: int
    reshard_after_forward: bool = False


LAYOUTS = {
    "1": Layout(1, 1),
    "2": Layout(1, 2),
    "3": Layout(1, 3),
    "4": Layout(1, 4),
    "2 x 2": Layout(2, 2),
    "2 replicas": Layout(2, 1),
    "2, resharded": Layout(1, 2, reshard_after_forward=True),
}


class Seen(NamedTuple):
    """What one rank saw; what is absent was not done on its layout."""

    accumulation: int
    placements: set[str]
    """Those of the leaves of the state, "" for plain tensors."""
    start: Params
    """The first parameters, whole."""
    grads: Params
    """Of the first batch, whole."""
    losses: list[float]
    norms: list[float]
    """Of the gradient, at each step."""
    val_losses: list[float]
    """At the start and at the end."""
    changed_losses: list[float]
    """Of the first batch with the first parameters, with others, and with the first ones again."""
    is_untouched: bool
    """Whether a step without `donate` left the state that it was given."""
    is_donated: bool
    """Whether a step with `donate` wrote the new state where the old one was."""
    bfloat16_losses: list[float]
    float16_losses: list[float] | None = None
    custom_losses: list[float] | None = None
    """With an optimizer that has to see the whole tree."""
    half_losses: list[float] | None = None
    """On a mesh of half the ranks, beside the other half: of the first batch with the first parameters or,
    on the second half, with others, and at validation with the first ones."""
    compiled_losses: list[float] | None = None
    refusals: list[str] | None = None
    """Of whole parameters by a training and by an eval step, of those of another mesh, of some only, and of
    turned targets by both steps."""
    gathered_bytes: tuple[int, int] | None = None
    """Of parameters, whole: most while an evaluation used them, and those left after it."""
    graphs: list[int] | None = None
    """Compiled for them, after each of those steps."""
    dropped_losses: list[float] | None = None
    """With dropout, of one batch for all ranks: on the mesh, and alone by the key of each rank."""
    reductions: int | None = None
    """How often a step of several microsteps added up gradients over the ranks."""
    gathers: int | None = None
    """How often it gathered parameters."""
    dtypes: dict[str, set[str]] | None = None
    """In bfloat16: of what functions are called with, and of the gradients that are added up."""
    whole_leaves: int | None = None
    """Most that lived at once while a state was made."""
    own_bytes: int | None = None
    """Of this rank's rows of the state."""
    stored_bytes: int | None = None
    """Of the memory that holds them."""


class Ranked:
    """A rank of a layout, that trains."""

    def __init__(self, layout: Layout, rank: int, mesh: sharding.DeviceMesh | None = None) -> None:
        size = layout.replicate * layout.shard
        own = SEQUENCES // size
        if mesh is None and size > 1:
            mesh = sharding.make_mesh("cpu", layout[:2])
        self.mesh = mesh
        self.process = dict(process_index=rank, process_count=size)
        self.spec = BatchSpec(
            block_size=CONFIG.block_size,
            batch_size=own if own % 2 else own // 2,
            total_batch_size=SEQUENCES * CONFIG.block_size,
            seed=0,
            **self.process,
        )
        self.choices = dict(mesh=self.mesh, reshard_after_forward=layout.reshard_after_forward)

    def batch(self, step: int) -> Batch:
        return batch_at(TOKENS, step, self.spec)

    def start(self, optimizer: Transform) -> TrainState:
        return init_state(CONFIG, optimizer, torch.Generator().manual_seed(0), mesh=self.mesh)

    def step(self, optimizer: Transform, precision: Any = "float32", *, donate: bool, compile: bool = False):
        choices = self.choices | dict(donate=donate, compile=compile)
        return make_train_step(CONFIG, optimizer, precision=precision, **choices)

    def train(self, optimizer: Transform, precision: str, steps: int, *, compile: bool = False) -> "Trained":
        step = self.step(optimizer, precision, donate=True, compile=compile)
        state, every, graphs, before = self.start(optimizer), [], [], counters["stats"]["unique_graphs"]
        for number in range(steps):
            state, metrics = step(state, self.batch(number))
            every.append(metrics)
            graphs.append(counters["stats"]["unique_graphs"] - before)
        losses, norms = ([float(metrics[name]) for metrics in every] for name in ("loss", "grad_norm"))
        return Trained(state, losses, norms, graphs)

    def validate(self, state: TrainState) -> float:
        windows = dict(token_count=80, block_size=CONFIG.block_size)  # eight: not full on three ranks
        device = torch.device("cpu")
        batches = validation_batches(TOKENS, **windows, batch_size=2, device=device, **self.process)
        count = CONFIG.block_size * validation_windows(TOKENS, **windows)
        step = make_eval_step(CONFIG, mesh=self.mesh, precision="float32", compile=False)
        return validation_loss(step, state.params, batches, count=count)


class Trained(NamedTuple):
    """What came of some steps."""

    state: TrainState
    losses: list[float]
    norms: list[float]
    graphs: list[int]


def see(layout: Layout, rank: int) -> Seen:
    """Does everything that is to be seen on a layout, as one of its ranks."""
    here = Ranked(layout, rank)
    first = here.start(ADAMW)
    changed, grads = losses_and_grads(here, first)
    trained = here.train(ADAMW, "float32", STEPS)
    seen = Seen(
        accumulation=here.spec.accumulation,
        placements={str(getattr(leaf, "placements", "")) for leaf in tree.leaves(trained.state)},
        start=tree.map(lambda leaf: sharding.whole(leaf).clone(), first.params),
        grads=tree.map(sharding.whole, grads),
        losses=trained.losses,
        norms=trained.norms,
        val_losses=[here.validate(here.start(ADAMW)), here.validate(trained.state)],
        changed_losses=changed,
        is_untouched=leaves_alone(here, first),
        is_donated=writes_over(here, first),
        bfloat16_losses=here.train(ADAMW, "bfloat16", 3).losses,
    )
    if layout[:2] in ((1, 1), (2, 2)):  # slow where torch's first calls with DTensors are
        scaled = here.train(optim.dynamic_loss_scale(ADAMW), "float16", 3)
        custom = here.train(normalized(), "float32", 3)
        seen = seen._replace(float16_losses=scaled.losses, custom_losses=custom.losses)
    if layout == LAYOUTS["2 x 2"]:
        half = Ranked(Layout(1, 2), rank % 2, here.mesh["shard"])
        seen = seen._replace(half_losses=losses_of_half(half, is_second=rank >= 2))
    if layout == LAYOUTS["2"]:
        seen = seen._replace(gathered_bytes=gathered_bytes(here, first), refusals=refusals(here, first))
        seen = seen._replace(dropped_losses=dropped_losses(here, first), dtypes=dtypes(here, first))
        compiled = here.train(ADAMW, "float32", 3, compile=True)
        seen = seen._replace(compiled_losses=compiled.losses, graphs=compiled.graphs)
    if layout in (LAYOUTS["2"], LAYOUTS["2, resharded"]):
        reductions, gathers = collectives(here, first)
        seen = seen._replace(reductions=reductions, gathers=gathers)
    if layout == LAYOUTS["4"]:
        own = tree.leaves(sharding.local(first))
        seen = seen._replace(
            whole_leaves=most_whole_leaves(here),
            own_bytes=sum(leaf.nbytes for leaf in own),
            stored_bytes=sum(leaf.untyped_storage().nbytes() for leaf in own),
        )
    return seen


def losses_and_grads(here: Ranked, state: TrainState) -> tuple[list[float], Params]:
    value_and_grad = make_value_and_grad(CONFIG, precision="float32", **here.choices)

    def at(params: Params) -> tuple[Tensor, Params]:
        return value_and_grad(params, here.batch(0), torch.tensor(0), torch.ones(()))

    loss, grads = at(state.params)
    changed, _ = at(tree.map(lambda leaf: leaf * 1.5, state.params))
    return [float(loss), float(changed), float(at(state.params)[0])], grads


def losses_of_half(half: Ranked, *, is_second: bool) -> list[float]:
    first = half.start(ADAMW)
    params = tree.map(lambda leaf: leaf * 1.5, first.params) if is_second else first.params
    value_and_grad = make_value_and_grad(CONFIG, precision="float32", **half.choices)
    loss, _ = value_and_grad(params, half.batch(0), torch.tensor(0), torch.ones(()))
    return [float(loss), half.validate(first)]


def refusals(here: Ranked, state: TrainState) -> list[str]:
    step, replicas = here.step(ADAMW, donate=False), sharding.make_mesh("cpu", (2, 1))
    whole = tree.map(sharding.whole, state.params)
    moved = tree.map(lambda leaf: sharding.place(leaf, replicas), whole)
    few = {name: leaf for name, leaf in state.params.items() if name != "ln_f.bias"}

    batch = here.batch(0)
    turned = batch._replace(targets=batch.targets.transpose(1, 2))
    eval_step = make_eval_step(CONFIG, mesh=here.mesh, precision="float32", compile=False)

    def train(state: TrainState) -> object:
        return step(state, batch)

    def said(use: Callable[[TrainState], object], params: Params) -> str:
        try:
            use(state._replace(params=params))
        except UserError as error:
            return str(error)
        return ""

    return [
        *(said(train, whole), said(here.validate, whole), said(train, moved), said(train, few)),
        said(lambda state: step(state, turned), state.params),
        said(lambda state: eval_step(state.params, turned), state.params),
    ]


def gathered_bytes(here: Ranked, state: TrainState) -> tuple[int, int]:
    """Of parameters, whole: most while an evaluation uses them, and those left after it."""
    forward, most, gathered = sharding.Held.forward, 0, {}

    def seeing(self: sharding.Held, *arguments: Any) -> Tensor:
        nonlocal most
        gathered.update({leaf.data_ptr(): leaf.untyped_storage() for leaf in self.parameters(recurse=False)})
        most = max(most, sum(storage.nbytes() for storage in gathered.values()))
        return forward(self, *arguments)

    sharding.Held.forward = seeing
    here.validate(state)
    sharding.Held.forward = forward
    return most, sum(storage.nbytes() for storage in gathered.values())


def dropped_losses(here: Ranked, state: TrainState) -> list[float]:
    config, key, scale = replace(CONFIG, dropout=0.5), torch.tensor(7), torch.ones(())
    batch = batch_at(TOKENS, 0, replace(here.spec, process_index=0))
    on_mesh = make_value_and_grad(config, precision="float32", **here.choices)
    alone = make_value_and_grad(config, precision="float32")
    whole = tree.map(sharding.whole, state.params)
    losses = [alone(whole, batch, fold_in(key, rank), scale)[0] for rank in range(here.spec.process_count)]
    return [float(loss) for loss in (on_mesh(state.params, batch, key, scale)[0], *losses)]


def collectives(here: Ranked, state: TrainState) -> tuple[int, int]:
    """How often a step adds up gradients, and gathers parameters."""
    value_and_grad = make_value_and_grad(CONFIG, precision="float32", **here.choices)
    with Seeing() as seeing:
        value_and_grad(state.params, here.batch(0), torch.tensor(0), torch.ones(()))
    names = [name for name, _ in seeing.calls]
    return names.count("c10d::_reduce_scatter_base_"), names.count("c10d::_allgather_base_")


def dtypes(here: Ranked, state: TrainState) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"blocks": set(), "outside": set()}
    forward = sharding.Held.forward

    def seeing_leaves(self: sharding.Held, *arguments: Any) -> Tensor:
        place = "outside" if hasattr(self, "blocks") else "blocks"
        found[place] |= {str(leaf.dtype) for leaf in self.parameters(recurse=False)}
        return forward(self, *arguments)

    sharding.Held.forward = seeing_leaves
    value_and_grad = make_value_and_grad(CONFIG, precision="bfloat16", **here.choices)
    with Seeing() as seeing:
        value_and_grad(state.params, here.batch(0), torch.tensor(0), torch.ones(()))
    sharding.Held.forward = forward
    return found | {
        "sums": {str(args[0].dtype) for name, args in seeing.calls if name == "c10d::_reduce_scatter_base_"}
    }


class Seeing(TorchDispatchMode):
    """Notes all operators that are called within it, by name and with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def leaves_alone(here: Ranked, state: TrainState) -> bool:
    before = tree.map(torch.clone, sharding.local(state))
    here.step(ADAMW, donate=False)(state, here.batch(0))
    return all(tree.leaves(tree.map(torch.equal, sharding.local(state), before)))


def writes_over(here: Ranked, state: TrainState) -> bool:
    """To be called last: the state is given away."""
    before = [leaf.data_ptr() for leaf in tree.leaves(sharding.local(state))]
    state, _ = here.step(ADAMW, donate=True)(state, here.batch(0))
    return [leaf.data_ptr() for leaf in tree.leaves(sharding.local(state))] == before


def most_whole_leaves(here: Ranked) -> int:
    """How many whole leaves live at once while a state is made."""
    place, storages, counts = sharding.place, [], []

    def counting(leaf: Tensor, mesh: sharding.DeviceMesh) -> Tensor:
        storages.append(weakref.ref(leaf.untyped_storage()))
        counts.append(sum(storage() is not None for storage in storages))
        return place(leaf, mesh)

    sharding.place = counting
    here.start(ADAMW)
    sharding.place = place
    return max(counts)


SCHEDULE = optim.warmup_cosine(1e-2, final=1e-3, warmup_steps=2, total_steps=40)
ADAMW = optim.chain(optim.clip_by_global_norm(0.3), optim.adamw(SCHEDULE, weight_decay=0.1))


def normalized() -> Transform:
    """Momentum in steps of one length, which no part of the tree knows, and none for the embeddings.

    It goes on in the direction of the step before, whose parameters its state is handed, and a leaf's rate is
    its average norm, which starts as a sum of which each rank has a part.
    """

    def init(params: Params) -> Any:
        return [tree.map(torch.zeros_like, params), params, tree.map(torch.norm, params)]

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        mu, before, norms = state
        mu = tree.map(lambda m, g: 0.9 * m + g, mu, updates)
        norms = tree.map(lambda n, p: 0.5 * (n + torch.norm(p)), norms, params)
        norm = tree.global_norm(mu)
        rates = {name: 0.0 if name == "wpe.weight" else -0.1 * norms[name] for name in mu}
        updates = tree.map(lambda m, rate, p, b: rate * m / norm + 0.5 * (p - b), mu, rates, params, before)
        return updates, [mu, params, norms]

    return Transform(init, update)


def fork(folder: Path, name: str, rank: int) -> int:
    """Starts a rank of a layout and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    layout = LAYOUTS[name]
    size = layout.replicate * layout.shard
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=size)
        torch.save(tuple(see(layout, rank)), folder / f"{name}-{rank}.pt")
        os._exit(0)
    finally:  # whatever it is that came here, the test shows it
        traceback.print_exc()
        os._exit(1)


def main(folder: Path) -> int:
    """Runs all ranks and returns how many failed."""
    pids = [
        fork(folder, name, rank)
        for name, layout in LAYOUTS.items()
        for rank in range(layout.replicate * layout.shard)
    ]
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The code generator of the default backend takes a minute here, and has nothing to do with the mesh.
    torch.compile = functools.partial(torch.compile, backend="eager")
    # Before ranks are forked, since it imports much.
    torch.compile(CONFIG.skeleton.ln_f.forward)(torch.ones(CONFIG.n_embd, device="meta"))
    sys.exit(main(Path(sys.argv[1])))
