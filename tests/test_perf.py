"""What a model costs, what a device can do, and whether they fit together."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanogpt import perf
from nanogpt.data import Batch
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config, init
from nanogpt.train import Precision, make_value_and_grad
from nanogpt.units import format_bytes, format_count, format_seconds

TINY = GPT2Config(vocab_size=11, block_size=5, n_layer=2, n_head=2, n_embd=4)
CPU = torch.device("cpu")


def hardware(name: str, *, bf16_fast: bool = True, fp16_fast: bool = True) -> perf.Hardware:
    return perf.Hardware(CPU, name, 2, 10**9, 10**9, bf16_fast, fp16_fast)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name: str, published: int):
    assert perf.parameter_count(GPT2Config.named(name)) == published


def test_parameters_of_a_tiny_model_add_up_by_hand():
    embeddings = 11 * 4 + 5 * 4
    attention = (4 * 12 + 12) + (4 * 4 + 4)
    mlp = (4 * 16 + 16) + (16 * 4 + 4)
    norms = 2 * (4 + 4)
    assert perf.parameter_count(TINY) == embeddings + 2 * (attention + mlp + norms) + (4 + 4)


def test_positions_can_be_left_out_of_the_count():
    assert perf.parameter_count(TINY) - perf.parameter_count(TINY, positions=False) == 5 * 4


def test_flops_of_a_token_are_six_per_parameter_and_twelve_lhqt_for_attention():
    L, H, Q, T = 12, 12, 64, 1024
    expected = 6 * (124_439_808 - 1024 * 768) + 12 * L * H * Q * T
    assert perf.flops_per_token(GPT2Config(), T) == expected == 855_166_464


def test_this_cpu_has_a_name_cores_and_memory():
    found = perf.detect(CPU)
    assert found.name
    assert found.cpu_cores >= 1
    assert 0 < found.available_bytes <= found.total_bytes


@pytest.mark.gpu
def test_a_gpu_has_a_name_and_memory():
    found = perf.detect(torch.device("cuda", 0))
    assert found.name == torch.cuda.get_device_name(0)
    assert 0 < found.available_bytes <= found.total_bytes


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu avx512f amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni", False),
        ("model name\t: bf16", False),
        ("", False),
    ],
)
def test_bf16_is_fast_only_where_the_cpu_multiplies_it(flags: str, has: bool):
    assert perf.has_bf16_instructions(f"processor\t: 0\n{flags}\n") is has


@pytest.mark.parametrize(
    ("bf16_fast", "fp16_fast", "precision"),
    [(True, True, "bfloat16"), (False, True, "float16"), (False, False, "float32")],
)
def test_the_default_precision_is_the_first_fast_one(bf16_fast: bool, fp16_fast: bool, precision: str):
    assert perf.default_precision(hardware("any", bf16_fast=bf16_fast, fp16_fast=fp16_fast)) == precision


@pytest.mark.parametrize(
    ("name", "precision", "peak", "source"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12, "A100 SXM data sheet, dense bf16"),
        ("NVIDIA A100 80GB PCIe", "float16", 312e12, "A100 PCIe data sheet, dense fp16"),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12, "H100 SXM data sheet, dense bf16"),
        ("NVIDIA H100 80GB HBM3", "float32", 67e12, "H100 SXM data sheet, dense fp32"),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12, "H100 PCIe data sheet, dense bf16"),
        ("NVIDIA A10G", "bfloat16", 70e12, "A10G data sheet, dense bf16"),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12, "RTX 4090 data sheet, dense bf16"),
        ("Tesla V100-SXM2-16GB", "float16", 125e12, "V100 SXM2 data sheet, dense fp16"),
    ],
)
def test_a_known_gpu_has_the_peak_of_its_data_sheet(name: str, precision: str, peak: float, source: str):
    assert perf.peak_flops(hardware(name), precision) == (pytest.approx(peak), source)


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD EPYC"]
)
def test_a_device_that_no_data_sheet_describes_is_measured(name: str):
    rate, source = perf.peak_flops(hardware(name), "float32")
    assert 1e8 < rate < 1e14
    assert source == "measured fp32 matmul on this CPU"


def test_a_data_sheet_is_not_asked_for_a_precision_that_the_gpu_emulates():
    _, source = perf.peak_flops(hardware("Tesla T4", bf16_fast=False), "bfloat16")
    assert source == "measured bf16 matmul on this CPU"


def test_measuring_ends_soon_even_where_bf16_is_emulated():
    start = time.perf_counter()
    rate = perf.measured_matmul_flops(CPU, torch.bfloat16)
    assert rate > 0
    assert time.perf_counter() - start < 10  # 1.5 s alone; this machine may be busy


def test_a_measured_product_gets_no_new_memory():
    # 50 MB of new pages took as long as the product: the peak came out at half of what the CPU does.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        perf.measured_matmul_flops(CPU, torch.float32, width=64)
    products = [event for event in profiler.events() if event.name == "aten::mm"]
    assert len(products) >= 7  # one that warms up, one that is looked at, five timings
    assert sum(event.self_cpu_memory_usage for event in products) == 0


def test_the_plan_of_a_tiny_model_adds_up_by_hand():
    plan = perf.memory_plan(
        TINY, batch_size=3, block_size=5, precision="bfloat16", loss_chunk_tokens=6, optimizer_slots=2
    )
    N = perf.parameter_count(TINY)
    per_layer = perf.SAVED_PER_LAYER * 4 * 2 + 2 * 4
    expected = {
        "parameters": 4 * N,
        "optimizer state": 8 * N,
        "gradients": 4 * N,
        "compute copy": 2 * 11 * 4,
        "activations": 15 * (2 * per_layer + 2 * 4 * 2),
        "logits": 6 * 11 * 2 * 2,
    }
    assert plan == expected | {"total": sum(expected.values())}


def test_fp32_needs_no_copy_to_compute_with_and_twice_the_activations():
    shape = {"batch_size": 4, "block_size": 1024, "loss_chunk_tokens": 1024}
    half = perf.memory_plan(GPT2Config(), precision="bfloat16", **shape)
    full = perf.memory_plan(GPT2Config(), precision="float32", **shape)
    assert full["compute copy"] == 0
    assert full["activations"] == pytest.approx(2 * half["activations"], rel=0.01)  # but for the log-sum-exp


def test_an_eager_block_remembers_what_a_compiled_one_computes_again():
    shape = {"batch_size": 4, "block_size": 1024, "loss_chunk_tokens": 1024, "precision": "float32"}
    eager, compiled = (
        perf.memory_plan(GPT2Config(), **shape, compile=compile)["activations"] for compile in (False, True)
    )
    gradients = perf.SAVED_FOR_A_SECOND_DERIVATIVE
    assert eager - compiled == 4 * 1024 * 12 * (6 + gradients) * 768 * 4  # norms 2, after GELU 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_eager_gradient_takes_the_memory_that_the_plan_says(precision: Precision) -> None:
    config = GPT2Config(vocab_size=64, block_size=256, n_layer=4, n_head=2, n_embd=64)
    taken, planned = peak_and_plan(config, precision, batch_size=8)
    assert taken == pytest.approx(planned, rel=0.1)  # norms' means, what the block at work holds, all copies


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_dropout_takes_the_memory_that_the_plan_says(precision: Precision) -> None:
    """Eagerly, with many more probabilities than features. The tests' shape checks hold arguments longer: 10
    % more than the plan, without them 3 to 6 % less."""
    config = GPT2Config(vocab_size=64, block_size=512, n_layer=3, n_head=8, n_embd=32)
    dropping = dataclasses.replace(config, dropout=0.1)
    without, dropped = (peak_and_plan(shape, precision, batch_size=1) for shape in (config, dropping))
    assert dropped[0] - without[0] == pytest.approx(dropped[1] - without[1], rel=0.15)


def peak_and_plan(config: GPT2Config, precision: Precision, *, batch_size: int) -> tuple[int, int]:
    """Most bytes that making a gradient takes at a time, and what was planned for it."""
    T = config.block_size
    plan = perf.memory_plan(
        config, batch_size=batch_size, block_size=T, precision=precision, loss_chunk_tokens=128, compile=False
    )
    params = init(config, torch.Generator().manual_seed(0))
    batch = Batch(*torch.zeros(2, 1, batch_size, T, dtype=torch.int64))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        value_and_grad = make_value_and_grad(config, precision=precision, loss_chunk_tokens=128)
        value_and_grad(params, batch, torch.tensor(0), torch.ones(()))
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    made = plan["gradients"] + plan["compute copy"] + plan["activations"] + plan["logits"]
    return max(itertools.accumulate(sizes)), made


def test_a_gpu_remembers_more_than_a_cpu_and_an_eager_step_more_than_a_compiled_one():
    shape = {"batch_size": 4, "block_size": 1024, "loss_chunk_tokens": 1024, "precision": "bfloat16"}
    activations = {
        (compile, device_type): perf.memory_plan(
            GPT2Config(), **shape, compile=compile, device_type=device_type
        )["activations"]
        for compile in (False, True)
        for device_type in ("cpu", "cuda")
    }
    assert activations[False, "cuda"] == activations[False, "cpu"]
    assert activations[True, "cpu"] < activations[True, "cuda"] < activations[False, "cuda"]


def test_more_microsteps_need_room_for_a_sum_of_gradients():
    shape = {"batch_size": 4, "block_size": 1024, "loss_chunk_tokens": 1024, "precision": "float32"}
    one, four = (perf.memory_plan(GPT2Config(), **shape, accumulation=A) for A in (1, 4))
    assert four["total"] - one["total"] == 4 * perf.parameter_count(GPT2Config())


def test_a_chunk_of_logits_is_no_longer_than_the_batch():
    plan = perf.memory_plan(TINY, batch_size=1, block_size=5, precision="float32", loss_chunk_tokens=4096)
    assert plan["logits"] == 5 * 11 * 8


def test_each_of_several_shards_keeps_its_part_and_sums_gradients_in_place():
    settings = dict(batch_size=1, block_size=5, precision="bfloat16", loss_chunk_tokens=6)
    plan = perf.memory_plan(TINY, **settings, accumulation=4, shards=3)
    N = perf.parameter_count(TINY)
    own = -(-4 * N // 3)
    kinds = "parameters", "optimizer state", "gradients", "compute copy"
    assert [plan[kind] for kind in kinds] == [own, 2 * own, 4 * N + own, 2 * N]


def fit(available_bytes: int, batch_size: int = 64, **settings: Any) -> int:
    return perf.fit_batch_size(
        GPT2Config(),
        batch_size=batch_size,
        block_size=1024,
        precision="bfloat16",
        loss_chunk_tokens=1024,
        available_bytes=available_bytes,
        **settings,
    )


def total(batch_size: int, *, accumulation: int = 1, **settings: Any) -> int:
    plan = perf.memory_plan(
        GPT2Config(),
        batch_size=batch_size,
        block_size=1024,
        precision="bfloat16",
        loss_chunk_tokens=1024,
        accumulation=accumulation * 64 // batch_size,
        **settings,
    )
    return plan["total"]


def test_a_micro_batch_that_fits_stays():
    assert fit(10**12) == 64


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(accumulation=2),
        dict(optimizer_slots=5),
        dict(shards=2),
        dict(compile=False),
        dict(device_type="cuda"),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_halved_until_its_plan_leaves_a_tenth_free(
    settings: dict[str, Any],
):
    for size in (64, 16, 2):
        enough = int(total(size, **settings) / 0.9) + 1
        assert fit(enough, **settings) == size
        assert fit(enough - 2, **settings) == size // 2


def test_a_smaller_micro_batch_divides_the_one_asked_for():
    assert fit(int(total(5) / 0.9) + 1, batch_size=12) == 4


def test_the_divisors_of_a_huge_micro_batch_are_found_at_once():
    assert fit(int(total(5) / 0.9) + 1, batch_size=10**10) == 5


def test_a_model_too_large_for_one_sequence_is_refused():
    with pytest.raises(UserError) as caught:
        fit(2 * 10**9)
    assert str(caught.value) == (
        f"one sequence of 1,024 tokens needs {format_bytes(total(1))}, expected at most 1.8 GB "
        "(90% of the device's free memory); "
        "free memory, or set a smaller --model.n-layer, --model.n-embd or --model.block-size"
    )


def write_group(folder: Path, *, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 3\n")


def test_a_container_has_the_memory_of_its_control_groups_and_file_cache_is_free(tmp_path: Path):
    write_group(tmp_path / "job" / "step", limit="max", used=5, cache=0)
    write_group(tmp_path / "job", limit="1000", used=600, cache=250)
    assert perf._control_groups(tmp_path, "3:cpu:/other\n0::/job/step\n") == [(1000, 350)]


def test_a_container_of_an_older_system_has_its_limit_too(tmp_path: Path):
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("600\n")
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 250\n")
    for name in ("memory", "cpu,memory", "memory,cpu"):
        assert perf._control_groups(tmp_path, f"5:cpuset:/other\n4:{name}:/job/step\n0::/\n") == [(1000, 350)]


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path):
    assert perf._control_groups(tmp_path, "") == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1.0K"),
        (524_288, "524.3K"),
        (999_949, "999.9K"),
        (999_960, "1.0M"),
        (124_439_808, "124.4M"),
        (9_035_582_198, "9.0B"),
        (1.5e15, "1500.0T"),
    ],
)
def test_counts_have_one_decimal_and_a_suffix(count: int | float, text: str):
    assert format_count(count) == text


@pytest.mark.parametrize(("size", "text"), [(512, "512 bytes"), (1.5e9, "1.5 GB"), (80e9, "80.0 GB")])
def test_sizes_are_in_decimal_units(size: int | float, text: str):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (192, "3:12"), (3599.7, "1:00:00"), (100_809, "28:00:09")],
)
def test_durations_are_minutes_and_seconds_then_hours(seconds: int | float, text: str):
    assert format_seconds(seconds) == text
