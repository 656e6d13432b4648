"""`python -m benchmarks.limit`: the least time that a step can take on this device, and where the rest goes.

The floor is the time of the matrix products at the rates measured for the model's own shapes, of attention's
causal half at the best of these rates, and of the optimizer's traffic at the measured memory bandwidth;
everything else counts as free. The breakdown is torch.profiler's, by group.
"""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import CONTENDERS, Work, batches_of, check_imports
from benchmarks.measure import (
    choose_device,
    facts,
    finish,
    one_line_errors,
    require_at_least,
    require_at_most,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
)
from nanogpt import perf
from nanogpt.command import parse
from nanogpt.model import GPT2Config
from nanogpt.train import DTYPES

OPTIMIZER_PASSES = 7  # reads gradient, parameter and two moments, writes the last three: fp32
BANDWIDTH_BYTES = 256 << 20  # far beyond any cache
CUDA_CALLS = 20  # launching one and waiting for it takes as long as a small product
TINY = GPT2Config(vocab_size=2048, block_size=128, n_layer=1, n_head=4, n_embd=128)

GROUPS = {
    # Batched products and a separate softmax are attention that is not one kernel; the last two patterns are
    # of cuDNN's backward pass.
    "attention": r"attention|by_products|^aten::(bmm|baddbmm|_softmax)|flash|fmha|cudnn.*sdpa"
    r"|softmax_backward.*attn|compute_dot_do_o|convert_dq",
    "matmul": r"^aten::(mm|addmm)|gemm|xmma|cutlass|nvjet|splitk|linear|mkldnn|matmul",
    "loss": r"softmax|nll|cross_entropy",
    "optimizer": r"adam|_foreach|sqrt|addcdiv|addcmul|norm\b|lpnorm|fused.*pow",
    "copies": r"copy|memcpy|memset|\bcat|clone|contiguous|zero_|fill_|aten::to$",
}
"""Names of operators and kernels by what they do; the first match counts. No match is elementwise work."""
FUSED = re.compile(r"(cpp|triton)_.*fused_")
FUSED_GROUPS = {"loss": r"logsumexp|softmax|nll|gather", "optimizer": r"lerp"}
"""The same for kernels that Inductor has fused: a copy in such a name is only a cast on the way, and AdamW's
means are lerps. No match is elementwise work of blocks: norms, GELU, residuals."""
AROUND = re.compile(r"Torch-Compiled|CompiledFunction|CompiledFxGraph|## Call|AOTDispatcher|TorchDynamo")
"""Names of whatever calls compiled graphs; the graphs' kernels have names of their own."""


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n] and how often a microstep does it."""

    name: str
    m: int
    k: int
    n: int
    count: int

    @property
    def flops(self) -> int:
        """FLOPs of all `count` products."""
        return 2 * self.m * self.k * self.n * self.count


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """Measure the floor of a step and what lies above it."""

    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """A published size."""
    batch_size: int = 4
    """Sequences in a microstep, at least 1."""
    block_size: int = 1024
    """Tokens in a sequence, from 1 to 1024."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is multiplied in; auto takes the fastest that trains on this device."""
    compile: bool = True
    """Profile the compiled step; the eager one names its work more finely."""
    contender: Literal["ours", "plain", "hugging_face", "litgpt"] = "ours"
    """Whose step to profile."""
    steps: int = 3
    """Profiled steps, at least 1."""
    device: str | None = None
    """cpu or cuda; None takes the GPU if there is one."""
    quick: bool = False
    """A model of one small layer, run eagerly, to see that everything works."""

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size, block_size=self.block_size, steps=self.steps)
        require_at_most(GPT2Config.block_size, block_size=self.block_size)


def work_of(config: LimitConfig) -> Work:
    """The step that `config` asks for."""
    device = choose_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = perf.default_precision(perf.detect(torch.device(device)))
    if config.quick:
        return Work(model=TINY, batch_size=2, precision=precision, compile=False, device=device)
    shape = asdict(GPT2Config.named(config.model)) | {"block_size": config.block_size}
    return Work(
        model=GPT2Config(**shape),
        batch_size=config.batch_size,
        precision=precision,
        compile=config.compile,
        device=device,
    )


def products_of(model: GPT2Config, rows: int) -> list[Product]:
    """Every matrix product of a forward and backward pass over `rows` tokens, attention left out."""
    C, L = model.n_embd, model.n_layer
    layers = {
        "qkv": (C, 3 * C, L),
        "attention out": (C, C, L),
        "mlp in": (C, 4 * C, L),
        "mlp out": (4 * C, C, L),
        "head": (C, model.padded_vocab_size, 1),
    }
    products = []
    for name, (n_in, n_out, count) in layers.items():
        products.append(Product(f"{name}, forward", rows, n_in, n_out, count))
        products.append(Product(f"{name}, by input", rows, n_out, n_in, count))
        products.append(Product(f"{name}, by weight", n_in, rows, n_out, count))
    return products


def seconds_of(function: Callable[[], Tensor], device: str, *, repeats: int = 5) -> float:
    """The best of `repeats` timings after a warm-up; on CUDA each is the mean of many calls, back to back."""
    calls = 1 if device == "cpu" else CUDA_CALLS
    timings = []
    for _ in range(repeats + 1):
        if device != "cpu":
            torch.accelerator.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if device != "cpu":
            torch.accelerator.synchronize()
        timings.append((time.perf_counter() - begin) / calls)
    return min(timings[1:])


def product_rate(product: Product, work: Work) -> float:
    """FLOP/s of the product in the work's precision."""
    dtype = DTYPES[work.precision]
    a = torch.randn(product.m, product.k, device=work.device, dtype=dtype)
    b = torch.randn(product.k, product.n, device=work.device, dtype=dtype)
    return product.flops / product.count / seconds_of(lambda: a @ b, work.device)


def memory_bandwidth(device: str) -> float:
    """Bytes a second of reading one array and writing another."""
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * BANDWIDTH_BYTES / seconds_of(lambda: target.copy_(source), device)


class Rates(NamedTuple):
    """The best that the device did."""

    products: dict[str, float]
    """FLOP/s by product."""
    memory: float
    """Bytes a second."""

    def or_higher(self, other: "Rates") -> "Rates":
        """The higher of both, rate by rate."""
        products = {name: max(rate, other.products[name]) for name, rate in self.products.items()}
        return Rates(products, max(self.memory, other.memory))


def rates_of(work: Work) -> Rates:
    """What this device does now; other programs can only make it less."""
    products = products_of(work.model, work.batch_size * work.model.block_size)
    rates = {product.name: product_rate(product, work) for product in products}
    return Rates(rates, memory_bandwidth(work.device))


def floor_of(work: Work, rates: Rates) -> dict[str, Any]:
    """Seconds, by kind, that a step cannot go below, and the rates that they follow from."""
    model, rows = work.model, work.batch_size * work.model.block_size
    products = products_of(model, rows)
    # Half of each of 7 products: 2 forward (scores, and their product with the values) and 5 backward (which
    # include the scores once more).
    attention_flops = 7 * model.n_layer * model.n_embd * model.block_size * rows
    seconds = {
        "matmul": work.accumulation
        * sum(product.flops / rates.products[product.name] for product in products),
        "attention": work.accumulation * attention_flops / max(rates.products.values()),
        "optimizer": OPTIMIZER_PASSES * 4 * perf.parameter_count(model) / rates.memory,
    }
    return {
        "seconds": seconds,
        "total_s": sum(seconds.values()),
        "product_flops_per_second": rates.products,
        "bandwidth_bytes_per_second": rates.memory,
    }


def group_of(name: str) -> str:
    """The group of an operator or kernel with this name."""
    if AROUND.search(name):
        return "around graphs"
    lowered = name.lower()
    groups = FUSED_GROUPS if FUSED.search(lowered) else GROUPS
    return next((group for group, pattern in groups.items() if re.search(pattern, lowered)), "elementwise")


def breakdown(work: Work, contender: str, steps: int) -> dict[str, Any]:
    """Seconds of a step by group; "idle" is time in which the profiler saw the device do nothing."""
    inductor.cpp.enable_kernel_profile = True  # or a CPU's compiled kernels would all be "around graphs"
    batches, step = batches_of(work), CONTENDERS[contender](work)
    is_cuda = work.device != "cpu"
    for batch in batches[:2]:
        step(batch).item()
    seconds = []
    for number in range(steps):
        begin = time.perf_counter()
        step(batches[number % len(batches)]).item()
        seconds.append(time.perf_counter() - begin)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        for number in range(steps):
            step(batches[number % len(batches)]).item()
        profiled_s = (time.perf_counter() - begin) / steps
    groups: dict[str, float] = {}
    top: dict[str, float] = {}
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if is_cuda != on_device or event.is_user_annotation:  # a range around kernels that are counted anyway
            continue
        own_s = (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6 / steps
        group = group_of(event.key)
        groups[group] = groups.get(group, 0.0) + own_s
        top[event.key] = own_s
    groups["idle"] = max(profiled_s - sum(groups.values()), 0.0)
    longest = dict(sorted(top.items(), key=lambda item: -item[1])[:12])
    return {
        "step_s": spread(seconds)._asdict(),
        "seconds": seconds,
        "profiled_step_s": profiled_s,
        "groups_s": groups,
        "longest_s": longest,
    }


def benchmark(config: LimitConfig) -> dict[str, Any]:
    """The floor, by the best rates before and after the steps; the breakdown; the floor's share of a step."""
    check_imports(config.contender)
    work = work_of(config)
    before = rates_of(work)
    say(f"floor: {floor_of(work, before)['total_s']:.3f} s")
    parts = breakdown(work, config.contender, config.steps)
    floor = floor_of(work, before.or_higher(rates_of(work)))
    return {
        "benchmark": "limit",
        "contender": config.contender,
        "facts": facts(work.device),
        "work": asdict(work),
        "floor": floor,
        "breakdown": parts,
        "floor_share": floor["total_s"] / parts["step_s"]["median"],
    }


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    floor, parts = result["floor"], result["breakdown"]
    shapes = [[name, f"{rate / 1e9:,.1f}"] for name, rate in floor["product_flops_per_second"].items()]
    groups = [*floor["seconds"], *(name for name in parts["groups_s"] if name not in floor["seconds"])]
    rows = [
        [name, f"{floor['seconds'].get(name, 0):.3f}", f"{parts['groups_s'].get(name, 0):.3f}"]
        for name in groups
    ]
    rows.append(["a step", f"{floor['total_s']:.3f}", f"{parts['profiled_step_s']:.3f}"])
    longest = [[name[:70], f"{seconds:.3f}"] for name, seconds in parts["longest_s"].items()]
    step, share = parts["step_s"]["median"], result["floor_share"]
    return "\n\n".join(
        [
            table(["product", "GFLOP/s"], shapes),
            f"memory: {floor['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s",
            table(["part", "floor s", "profiled s"], rows),
            f"unprofiled, a step takes {step:.3f} s; the floor is {share:.1%} of it",
            table(["longest", "s a step"], longest),
        ]
    )


def main() -> None:
    with one_line_errors():
        config = parse(LimitConfig, default=LimitConfig())
        say_what_quick_leaves_out(config, "model", "batch_size", "block_size")
        result = benchmark(config)
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
