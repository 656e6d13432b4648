"""On a GPU a step is the CPU's step, in the memory that the plan says: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from tiny_run import arguments, write_tokens

from experiments.gpt2_124m import config as gpt2_124m
from nanogpt import perf, tree
from nanogpt.attention import Attention
from nanogpt.checkpoint import Checkpointer
from nanogpt.data import Batch, prefetch
from nanogpt.loss import GPU_CHUNK_TOKENS
from nanogpt.model import GPT2Config, init
from nanogpt.optim import adamw, chain, clip_by_global_norm, dynamic_loss_scale
from nanogpt.run import main
from nanogpt.sample import generate
from nanogpt.tracker import read_metrics
from nanogpt.train import Precision, init_state, make_eval_step, make_train_step

pytestmark = pytest.mark.gpu

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SMALL = GPT2Config(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=128)
OPTIMIZER = chain(clip_by_global_norm(1.0), adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1))
BATCH = Batch(*torch.randint(300, (2, 2, 4, 64), generator=torch.Generator().manual_seed(0)))


def losses(
    device: torch.device, precision: Precision, *, attention: Attention = "auto", compile: bool = False
) -> list[float]:
    """Of five steps and an evaluation, from the same parameters on each device."""
    params = {name: leaf.to(device) for name, leaf in init(SMALL, torch.Generator().manual_seed(0)).items()}
    optimizer = dynamic_loss_scale(OPTIMIZER) if precision == "float16" else OPTIMIZER
    state = init_state(SMALL, optimizer, torch.Generator(device))
    state = state._replace(params=params)
    options = dict(precision=precision, attention=attention, compile=compile)
    step = make_train_step(SMALL, optimizer, donate=True, **options)
    batch, found = Batch(*(part.to(device) for part in BATCH)), []
    for _ in range(5):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return [*found, float(make_eval_step(SMALL, **options)(state.params, batch)) / BATCH.targets.numel()]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("precision", "rtol"), [("float32", 1e-5), ("bfloat16", 5e-3), ("float16", 1e-3)])
def test_a_step_is_that_of_the_cpu(precision: Precision, rtol: float, compile: bool) -> None:
    assert losses(CUDA, precision, compile=compile) == pytest.approx(losses(CPU, "float32"), rel=rtol)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("attention", ["flash", "cudnn", "efficient", "math"])
def test_each_attention_trains(attention: Attention, compile: bool) -> None:
    found = losses(CUDA, "bfloat16", attention=attention, compile=compile)
    assert found == pytest.approx(losses(CPU, "float32"), rel=5e-3)


def test_a_step_takes_the_memory_that_the_plan_says() -> None:
    config, batch_size = GPT2Config(n_layer=4), 16
    plan = perf.memory_plan(
        config,
        batch_size=batch_size,
        block_size=config.block_size,
        precision="bfloat16",
        loss_chunk_tokens=GPU_CHUNK_TOKENS,
        device_type="cuda",
    )
    state = init_state(config, OPTIMIZER, torch.Generator(CUDA).manual_seed(0))
    step = make_train_step(config, OPTIMIZER, donate=True, loss_chunk_tokens=GPU_CHUNK_TOKENS)
    batch = Batch(*torch.randint(config.vocab_size, (2, 1, batch_size, config.block_size), device=CUDA))
    state, _ = step(state, batch)
    torch.cuda.reset_peak_memory_stats()
    state, _ = step(state, batch)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == pytest.approx(plan["total"], rel=0.05)


def test_batches_arrive_whole_and_in_order() -> None:
    def batch_of(step: int) -> Batch:
        return Batch(*torch.full((2, 1, 8, 4096), step))

    for step, batch in enumerate(prefetch(batch_of, range(20), CUDA)):
        assert batch.inputs.is_cuda
        assert (batch.inputs == step).all()
        assert (batch.targets == step).all()


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_text_is_that_of_the_cpu(compile: bool) -> None:
    params = init(SMALL, torch.Generator().manual_seed(0))
    prompt, wanted = torch.zeros(2, 5, dtype=torch.int64), dict(max_new_tokens=90, temperature=0.0)
    on_gpu = {name: leaf.to(CUDA) for name, leaf in params.items()}
    found = generate(on_gpu, SMALL, prompt.to(CUDA), compile=compile, **wanted)
    assert found.tolist() == generate(params, SMALL, prompt, **wanted).tolist()


def test_a_checkpoint_brings_the_state_back_to_the_gpu(tmp_path: Path) -> None:
    state = init_state(SMALL, OPTIMIZER, torch.Generator(CUDA).manual_seed(0))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(3, state, metadata={})
    checkpointer.wait()
    restored = checkpointer.restore(3, like=state)
    checkpointer.close()
    for kept, saved in zip(tree.leaves(restored), tree.leaves(state), strict=True):
        assert kept.is_cuda
        assert kept.equal(saved)


def test_a_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "data", torch.arange(4000).numpy() % 32)
    flags = dict(data__path=tmp_path / "data", run_dir=tmp_path / "run", train__device="cuda")
    for stop_after in (7, 20):
        command = arguments(train__precision=None, train__stop_after=stop_after, **flags)
        monkeypatch.setattr("sys.argv", ["experiment", *command])
        result = main(gpt2_124m)
    assert result is not None
    assert result.step == 20
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out
    steps = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if "seconds" in record]
    assert len(steps) == 20
    assert all(record["seconds"] > 0 for record in steps)
