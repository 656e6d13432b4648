"""What a model costs and what this machine can do: parameters, FLOPs, memory, peak rate.

FLOPs follow PaLM (Chowdhery et al. 2022, appendix B): a multiply-add counts as two. Sizes are in bytes, rates
in FLOP/s.
"""

import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

from nanogpt.cores import usable_cores
from nanogpt.errors import UserError
from nanogpt.units import format_bytes

USABLE_FRACTION = 0.9
"""Fraction of the available memory that a plan may fill; the rest is for fragmentation and the runtime."""

SAVED_PER_LAYER = 10
"""Numbers that a block compiled for a CPU keeps for backward, per token and in units of n_embd, in the
compute dtype: input 1, q k v 3, attention output 1, residual 1, hidden layer before GELU 4."""

SAVED_PER_EAGER_LAYER = 16
"""The same for an eager block, and for any block on a GPU: also both norms 2, hidden layer after GELU 4."""

SAVED_FOR_A_SECOND_DERIVATIVE = 12
"""What an eager block on one device adds: `torch.func.grad` expects to be differentiated itself."""

BYTES_PER_DROPPED, BYTES_PER_EAGERLY_DROPPED = 2, 10
"""What a block with dropout keeps per attention probability, in addition to one number (eager: two): the mask
and by-products of drawing it. Fused attention has no dropout, so each head's T x T matrix exists."""
BYTES_PER_DRAWN = 8
"""What the block being computed holds per attention probability on top of that."""

NUMBERS_PER_LOGIT = 2
"""What a compiled chunk of the loss holds per logit, in the compute dtype: the logit and its gradient."""

BYTES_PER_EAGER_LOGIT = 16
"""What an eager chunk holds per logit in any precision: logit, one-hot, two softmax intermediates in fp32."""


@runtime_checkable
class Shape(Protocol):
    """The part of a model's config that decides what it costs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def dropout(self) -> float: ...


class Hardware(NamedTuple):
    """One device and the machine around it; `available_bytes` is what was free at the time of asking."""

    device: torch.device
    name: str
    cpu_cores: int
    total_bytes: int
    available_bytes: int
    bf16_fast: bool
    fp16_fast: bool


def parameter_count(config: Shape, *, positions: bool = True) -> int:
    """Number of trained parameters: head tied to the embedding, vocabulary unpadded.

    A block has 12 C^2 weights (attention 4, MLP 8) and 13 C biases and norms (4 norm, 4 attention, 5 MLP).
    """
    C = config.n_embd
    embeddings = config.vocab_size * C + (config.block_size * C if positions else 0)
    return embeddings + config.n_layer * (12 * C * C + 13 * C) + 2 * C


def flops_per_token(config: Shape, block_size: int) -> int:
    """FLOPs of one token's forward and backward in sequences of `block_size`: 6 N + 12 L H Q T.

    N excludes position embeddings. Attention counts all T x T pairs, though a causal kernel can skip half.
    Source: PaLM (Chowdhery et al. 2022), appendix B, as nanoGPT uses it.
    """
    attention = 12 * config.n_layer * config.n_embd * block_size
    return 6 * parameter_count(config, positions=False) + attention


def detect(device: torch.device) -> Hardware:
    """What `device` is and how much memory is free on it right now."""
    cores = usable_cores()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        capability = torch.cuda.get_device_capability(device)
        # Tensor cores multiply fp16 from 7.0 (V100) and bf16 from 8.0 (A100) on; before that half precision
        # is slow.
        fast = {"bf16_fast": capability >= (8, 0), "fp16_fast": capability >= (7, 0)}
        return Hardware(device, torch.cuda.get_device_name(device), cores, total, free, **fast)
    total, available = host_memory()
    if device.type == "mps":  # the first Apple GPUs emulate bf16, and nothing tells which one this is
        return Hardware(
            device, f"{_cpu_name()} GPU", cores, total, available, bf16_fast=False, fp16_fast=False
        )
    fast = {"bf16_fast": has_bf16_instructions(_cpuinfo()), "fp16_fast": False}
    return Hardware(device, _cpu_name(), cores, total, available, **fast)


def has_bf16_instructions(cpuinfo: str) -> bool:
    """Whether the text of /proc/cpuinfo names bf16 products: AVX-512 BF16, AMX, or Arm's BF16.

    Without them bf16 is emulated: AVX2, and plain AVX-512 too, convert each number on the way in and out.
    """
    lines = (line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")))
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(next(lines, "").split())


def default_precision(hardware: Hardware) -> Literal["bfloat16", "float16", "float32"]:
    """The fastest precision that trains here: bfloat16, or float16 on a GPU without it, or float32."""
    if hardware.bf16_fast:
        return "bfloat16"
    return "float16" if hardware.fp16_fast else "float32"


class Sheet(NamedTuple):
    """Dense peaks of one GPU in TFLOP/s: half precision accumulated in fp32, and fp32 without TF32."""

    label: str
    half: float
    float32: float


# Keys: the driver's name for the device in capitals, without vendor and memory size. A name with any other
# word (a MIG slice, a laptop part) is another device and is measured. Sources: the makers' data sheets
# (NVIDIA prints most rates with 2:4 sparsity, which doubles them: halved here), and for GeForce the GA102 and
# AD102 white papers, since their tensor cores run at half rate when they accumulate in fp32, as training
# does.
DATA_SHEETS = {
    "V100 SXM2": Sheet("V100 SXM2", 125, 15.7),
    "V100 PCIE": Sheet("V100 PCIe", 112, 14),
    "T4": Sheet("T4", 65, 8.1),
    "A100 SXM4": Sheet("A100 SXM", 312, 19.5),
    "A100 PCIE": Sheet("A100 PCIe", 312, 19.5),
    "A30": Sheet("A30", 165, 10.3),
    "A40": Sheet("A40", 149.7, 37.4),
    "A10": Sheet("A10", 125, 31.2),
    "A10G": Sheet("A10G", 70, 35),
    "RTX A6000": Sheet("RTX A6000", 154.8, 38.7),
    "RTX 3090": Sheet("RTX 3090", 71, 35.6),
    "RTX 4090": Sheet("RTX 4090", 165.2, 82.6),
    "L4": Sheet("L4", 121, 30.3),
    "L40": Sheet("L40", 181, 90.5),
    "L40S": Sheet("L40S", 362, 91.6),
    "H100 HBM3": Sheet("H100 SXM", 989, 67),
    "H100 PCIE": Sheet("H100 PCIe", 756, 51),
    "H100 NVL": Sheet("H100 NVL", 835, 60),
    "GH200": Sheet("GH200", 989, 67),
    "H200": Sheet("H200 SXM", 989, 67),
    "H200 NVL": Sheet("H200 NVL", 835, 60),
    "B200": Sheet("B200", 2250, 75),
    "MI300X": Sheet("MI300X", 1307, 163.4),
}
SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def peak_flops(hardware: Hardware, precision: str) -> tuple[float, str]:
    """The device's dense peak in FLOP/s and where it comes from: a data sheet, or a short measurement."""
    sheet = DATA_SHEETS.get(sheet_key(hardware.name))
    short = SHORT_NAMES[precision]
    if sheet is None or (precision == "bfloat16" and not hardware.bf16_fast):
        rate = measured_matmul_flops(hardware.device, getattr(torch, precision))
        return rate, f"measured {short} matmul on this {'CPU' if hardware.device.type == 'cpu' else 'GPU'}"
    rate = sheet.float32 if precision == "float32" else sheet.half
    return rate * 1e12, f"{sheet.label} data sheet, dense {short}"


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, *, width: int = 768) -> float:
    """FLOP/s of the MLP's first product, [rows, width] x [width, 4 width]; the best of 5 timings.

    Rows grow from 8 until a product takes 50 ms: emulated bf16 can be 100 times slower than fp32, so a size
    that suits one would take a minute with the other. Takes about 0.5 s in all; 1.5 s if bf16 is emulated.
    Products reuse one buffer, since a CPU with fast bf16 takes as long to obtain a new page as to fill it.
    """
    weight = torch.ones(width, 4 * width, device=device, dtype=dtype)
    rows, seconds = 2, 0.0
    while seconds < 0.05 and rows < 8192:
        rows *= 4
        x = torch.ones(rows, width, device=device, dtype=dtype)
        out = torch.empty(rows, 4 * width, device=device, dtype=dtype)
        _seconds(x, weight, out, repeats=1)  # pays for starting threads, loading kernels and new pages
        seconds = _seconds(x, weight, out, repeats=1)
    repeats = max(int(0.05 / seconds), 1)
    timings = [_seconds(x, weight, out, repeats=repeats) for _ in range(5)]
    return repeats * 2 * rows * width * 4 * width / min(timings)


def memory_plan(
    config: Shape,
    *,
    batch_size: int,
    block_size: int,
    precision: str,
    loss_chunk_tokens: int,
    accumulation: int = 1,
    optimizer_slots: int = 2,
    shards: int = 1,
    compile: bool = True,
    device_type: str = "cpu",
) -> dict[str, int]:
    """Bytes that a training step needs on one device, by kind, and their "total".

    Parameters, gradients and each optimizer slot (AdamW has two) are fp32. With `accumulation` above 1, a
    microstep's gradients exist alongside the sum of the earlier ones. Half precision adds a copy of the
    parameters to compute with, of which a compiled step on one device keeps only the head's: it copies one
    block at a time. Each of several `shards` keeps its part of these, and while it computes the whole
    parameters and gradients.

    Activations are what backward needs of `batch_size` sequences of `block_size` tokens. Per token and block:
    SAVED_PER_LAYER x n_embd numbers, or without `compile` or on "cuda" SAVED_PER_EAGER_LAYER (when eager on
    one shard also SAVED_FOR_A_SECOND_DERIVATIVE), and one fp32 log-sum-exp per head (no T x T matrix, since
    attention is fused). Per token: the last norm's input and output. With dropout the T x T matrices of all
    blocks exist too, at BYTES_PER_DROPPED and the constants after it. Logits are those of one chunk of the
    loss, at NUMBERS_PER_LOGIT or, when eager, BYTES_PER_EAGER_LOGIT.
    """
    number = 4 if precision == "float32" else 2
    parameters = 4 * parameter_count(config)
    tokens = batch_size * block_size
    saved = SAVED_PER_LAYER if compile and device_type != "cuda" else SAVED_PER_EAGER_LAYER
    saved += SAVED_FOR_A_SECOND_DERIVATIVE if not compile and shards == 1 else 0
    logit = NUMBERS_PER_LOGIT * number if compile else BYTES_PER_EAGER_LOGIT
    per_layer = saved * config.n_embd * number + 4 * config.n_head
    dropped = number + BYTES_PER_DROPPED if compile else 2 * number + BYTES_PER_EAGERLY_DROPPED
    probabilities = config.n_head * block_size if config.dropout else 0
    kept = config.n_layer * (per_layer + probabilities * dropped) + probabilities * BYTES_PER_DRAWN
    own = math.ceil(parameters / shards)
    narrow = config.vocab_size * config.n_embd if compile and shards == 1 else parameter_count(config)
    copied = number * narrow if shards > 1 or precision != "float32" else 0
    summed = parameters if accumulation > 1 and shards == 1 else 0  # FSDP2 accumulates in place
    plan = {
        "parameters": own,
        "optimizer state": optimizer_slots * own,
        "gradients": parameters + summed + (own if shards > 1 else 0),
        "compute copy": copied,
        "activations": tokens * (kept + 2 * config.n_embd * number),
        "logits": min(loss_chunk_tokens, tokens) * config.vocab_size * logit,
    }
    return plan | {"total": sum(plan.values())}


def fit_batch_size(
    config: Shape,
    *,
    batch_size: int,
    block_size: int,
    precision: str,
    loss_chunk_tokens: int,
    available_bytes: int,
    accumulation: int = 1,
    optimizer_slots: int = 2,
    shards: int = 1,
    compile: bool = True,
    device_type: str = "cpu",
) -> int:
    """The largest divisor of `batch_size` whose plan fills at most USABLE_FRACTION of `available_bytes`.

    For a power of two that means halving. A divisor, so that more `accumulation` makes up for it exactly.
    Raises UserError if not even one sequence fits.
    """

    def total(size: int) -> int:
        plan = memory_plan(
            config,
            batch_size=size,
            block_size=block_size,
            precision=precision,
            loss_chunk_tokens=loss_chunk_tokens,
            accumulation=accumulation * batch_size // size,
            optimizer_slots=optimizer_slots,
            shards=shards,
            compile=compile,
            device_type=device_type,
        )
        return plan["total"]

    usable = USABLE_FRACTION * available_bytes
    small = [size for size in range(1, math.isqrt(batch_size) + 1) if batch_size % size == 0]
    for size in (*(batch_size // divisor for divisor in small), *reversed(small)):
        if total(size) <= usable:
            return size
    raise UserError(
        f"one sequence of {block_size:,} tokens needs {format_bytes(total(1))}, expected at most "
        f"{format_bytes(usable)} ({USABLE_FRACTION:.0%} of the device's free memory); "
        f"free memory, or set a smaller --model.n-layer, --model.n-embd or --model.block-size"
    )


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, repeats: int) -> float:
    """Wall time of `repeats` products into `out`, the device idle before and after."""
    _wait_for(a.device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    _wait_for(a.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def sheet_key(name: str) -> str:
    """The driver's name for a GPU without vendor and memory size: "NVIDIA A100-SXM4-80GB" is "A100 SXM4"."""
    words = re.findall(r"\w+", name.upper())
    vendor = {"NVIDIA", "TESLA", "GEFORCE", "AMD", "INSTINCT"}
    return " ".join(word for word in words if word not in vendor and not re.fullmatch(r"\d+GB", word))


def host_memory() -> tuple[int, int]:
    """Total and available bytes for this process: the machine's, or its control group's if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    available = int(meminfo[1]) * 1024 if meminfo else total
    for limit, used in _control_groups(Path("/sys/fs/cgroup"), _read("/proc/self/cgroup")):
        total, available = min(total, limit), min(available, limit - used)
    return total, max(available, 0)


def _control_groups(root: Path, membership: str) -> list[tuple[int, int]]:
    """(limit, used) bytes of each control group (version 2 or 1) with a limit, from one's own up to the root.

    File cache does not count as used: the kernel drops it when memory runs short.
    """
    versions = (
        (root, "0:", "memory.max", "memory.current", "inactive_file"),
        (
            root / "memory",
            r"\d+:(?:\S+,)?memory(?:,\S+)?",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
    found = []
    for top, controller, limit_name, used_name, cache_name in versions:
        own = re.search(rf"^{controller}:/(.*)$", membership, re.MULTILINE)
        group = top / (own[1] if own else "")
        for folder in [group, *group.parents][: len(group.relative_to(top).parts) + 1]:
            limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
            cache = re.search(rf"^{cache_name} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            if limit.isdigit() and used.isdigit():
                found.append((int(limit), int(used) - (int(cache[1]) if cache else 0)))
    return found


def _cpu_name() -> str:
    model = re.search(r"^model name\s*: (.+)$", _cpuinfo(), re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _cpuinfo() -> str:
    return _read("/proc/cpuinfo")


def _read(path: str | Path) -> str:
    """The file's text; empty if there is none, as on systems other than Linux."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
