"""`python -m benchmarks.peers`: the same training step by us and by others, turn by turn in one run.

Each contender runs in a process of its own and they take turns, one step each (eight on CUDA), so that
whatever disturbs the machine disturbs all of them. Ratios are of times in the same turn. MFU is relative to
perf.peak_flops or, if that is measured, to the best one measured before and between the turns. This is the
rate of the best moment, and a step lasts for many. So on a CPU a bare matrix product takes turns too, for as
many FLOPs as a step has, and a contender's rate is also given as a share of the product's in the same turn.
A contender that fails is left out from then on, and the table says why; ours must not fail.
"""

import contextlib
import importlib.metadata
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from benchmarks.contenders import Work, check_installed, installed_contenders
from benchmarks.measure import (
    FIRST_STEP,
    choose_device,
    facts,
    finish,
    one_line_errors,
    require_at_least,
    require_at_most,
    require_some,
    say,
    say_what_quick_leaves_out,
    spread,
    table,
    versions_line,
)
from benchmarks.worker import Memory, Started, Worker, WorkerError
from nanogpt import perf
from nanogpt.command import parse
from nanogpt.errors import UserError
from nanogpt.model import GPT2Config
from nanogpt.train import DTYPES
from nanogpt.units import format_bytes

QUICK = GPT2Config(vocab_size=2048, block_size=128, n_layer=1, n_head=4, n_embd=128)
EQUAL_WORK = {"float32": 2e-3, "bfloat16": 2e-2, "float16": 2e-2}
"""How far losses may differ after the same steps: in fp32, by what padded columns take of the softmax."""
PRODUCT = "a bare product"
PRODUCT_SHAPE = (8192, 768, 4 * 768)  # of perf.measured_matmul_flops
PRODUCT_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """Train the same model with the same batches, by us and by others, turn by turn."""

    contenders: tuple[Literal["ours", "plain", "hugging_face", "litgpt"], ...] | None = None
    """Who takes part; ours must. None takes all that are installed."""
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """A published size."""
    batch_size: int = 4
    """Sequences in a microstep, at least 1."""
    block_size: int = 1024
    """Tokens in a sequence, from 1 to 1024."""
    accumulation: int = 1
    """Microsteps in a step, at least 1."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is multiplied in; auto takes the fastest that trains on this device."""
    compile: bool = True
    """Compile everybody."""
    turns: int = 10
    """Turns of each contender, at least 2."""
    steps: int | None = None
    """Steps in a turn, at least 1; None takes 1 on a CPU and 8 on CUDA."""
    device: str | None = None
    """cpu or cuda; None takes the GPU if there is one."""
    all_keep_memory: bool = False
    """Let everybody keep freed memory on a CPU (mallopt), as a run of ours does; the others, as their users
    write them, do not."""
    quick: bool = False
    """A model of one small layer, run eagerly, to see that everything works."""

    def __post_init__(self) -> None:
        require_at_least(2, turns=self.turns)
        require_at_least(
            1,
            batch_size=self.batch_size,
            block_size=self.block_size,
            accumulation=self.accumulation,
            steps=self.steps,
        )
        require_at_most(GPT2Config.block_size, block_size=self.block_size)
        require_some(contenders=self.contenders)
        if self.contenders is not None and "ours" not in self.contenders:
            raise UserError(
                f"contenders are {', '.join(self.contenders)}, expected ours among them; set --contenders"
            )


def work_of(config: PeersConfig) -> Work:
    """The step that `config` asks for."""
    device = choose_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = perf.default_precision(perf.detect(torch.device(device)))
    if config.quick:
        return Work(model=QUICK, batch_size=2, precision=precision, compile=False, device=device)
    shape = asdict(GPT2Config.named(config.model)) | {"block_size": config.block_size}
    return Work(
        model=GPT2Config(**shape),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        precision=precision,
        compile=config.compile,
        device=device,
        all_keep_memory=config.all_keep_memory,
    )


def compare(config: PeersConfig) -> dict[str, Any]:
    """Everybody's times, memory and ratio to ours."""
    work = work_of(config)
    names = contenders_of(config)
    steps = config.steps or (1 if work.device == "cpu" else 8)
    hardware = perf.detect(torch.device(work.device))
    peak, source = perf.peak_flops(hardware, work.precision)
    with contextlib.ExitStack() as stack:
        field, starts, times, losses, rates = Field(), {}, {name: [] for name in names}, {}, []
        for name in names:
            field.workers[name] = stack.enter_context(Worker(name, work))
            if started := field.ask(name, "start"):
                starts[name] = started
                say(f"{name}: first step after {started.first_step_s:.1f} s")
        for turn in range(config.turns):
            entrants = [*field.workers, *([PRODUCT] if work.device == "cpu" else [])]
            # Whoever comes first changes with the turn, so that nobody always follows the same one.
            for name in entrants[turn % len(entrants) :] + entrants[: turn % len(entrants)]:
                if name == PRODUCT:
                    rates.append(bare_product_rate(work, peak))
                elif taken := field.ask(name, "turn", steps):
                    times[name].append(spread(taken.seconds).median)
                    losses[name] = taken.loss
            said = [f"{name} {times[name][-1]:.3f} s" for name in field.workers]
            said += [f"{PRODUCT} {rate / 1e9:.0f} GFLOP/s" for rate in rates[-1:]]
            say(f"turn {turn + 1}: {', '.join(said)}")
            peak = max(peak, perf.peak_flops(hardware, work.precision)[0])
        memory = {name: field.ask(name, "memory") for name in [*field.workers]}
    check_equal_work({name: losses[name] for name in field.workers}, work)
    return {
        "benchmark": "peers",
        "facts": facts(work.device),
        "work": asdict(work),
        "versions": {name: version_of(name) for name in ("transformers", "litgpt")},
        "steps_in_a_turn": steps,
        "peak_flops": peak,
        "peak_source": source,
        "product_flops_per_second": rates,
        "contenders": {
            name: contender_result(
                work, peak, rates, times[name], times["ours"], losses[name], starts[name], memory[name]
            )
            for name in field.workers
        },
        "failed": field.failed,
    }


def contenders_of(config: PeersConfig) -> list[str]:
    """The contenders that take part. Raises UserError for one whose package is not installed."""
    names = list(dict.fromkeys(config.contenders or installed_contenders()))  # each once
    check_installed(*names)
    return names


class Field:
    """The contenders that still take part, and why others no longer do."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}

    def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """What the contender's method returns; None if it fails, after which it no longer takes part.

        Raises WorkerError if ours fails.
        """
        try:
            return self.workers[name].ask(method, *arguments)
        except WorkerError as error:
            if name == "ours":
                raise
            self.failed[name] = error.last_line
            self.workers.pop(name).close()
            say(f"{name} failed and is left out: {error.last_line}")
            return None


def bare_product_rate(work: Work, peak: float) -> float:
    """FLOP/s of a product that is repeated for as many FLOPs as a step has, by a device of `peak` FLOP/s.

    Stops after 30 s, and has fewer rows if one product would take a tenth of that, since some CPUs emulate a
    precision slowly.
    """
    (m, k, n), dtype = PRODUCT_SHAPE, DTYPES[work.precision]
    while m > 1 and 2 * m * k * n > peak * PRODUCT_LIMIT_S / 10:
        m //= 2
    x, weight = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
    out = x @ weight  # starts its threads and touches its pages
    wanted, done, begin = step_flops(work), 0, time.perf_counter()
    while done < wanted and time.perf_counter() - begin < PRODUCT_LIMIT_S:
        torch.mm(x, weight, out=out)
        done += 2 * m * k * n
    return done / (time.perf_counter() - begin)


def step_flops(work: Work) -> float:
    """FLOPs of a whole step, as MFU counts them."""
    return work.tokens * perf.flops_per_token(work.model, work.model.block_size)


def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_equal_work(losses: dict[str, float], work: Work) -> None:
    """Raises AssertionError if losses after equally many steps differ: then the work is not the same."""
    for name, loss in losses.items():
        apart = abs(loss - losses["ours"])
        assert name == "litgpt" or apart < EQUAL_WORK[work.precision], (
            f"{name}'s loss is {loss}, ours {losses['ours']}"
        )


def contender_result(
    work: Work,
    peak: float,
    product_rates: list[float],
    seconds: list[float],
    our_seconds: list[float],
    loss: float,
    start: Started,
    memory: Memory,
) -> dict[str, Any]:
    """One contender's numbers.

    `speedup_of_ours` is its time over ours in the same turn; `share_of_product` its FLOP/s over those of the
    bare product in the same turn, if there was one.
    """
    step, flops = spread(seconds), step_flops(work)
    pairs = zip(seconds, product_rates, strict=bool(product_rates))
    shares = [flops / taken / rate for taken, rate in pairs]
    return {
        "tokens_per_second": work.tokens / step.median,
        "mfu": flops / step.median / peak,
        "share_of_product": spread(shares)._asdict() if shares else None,
        "step_s": step._asdict(),
        "seconds": seconds,
        "speedup_of_ours": spread(a / b for a, b in zip(seconds, our_seconds, strict=True))._asdict(),
        "memory": memory._asdict(),
        "started": start._asdict(),
        "loss": loss,
    }


def table_of(result: dict[str, Any]) -> str:
    """The result as people read it."""
    rows, has_shares = [], bool(result.get("product_flops_per_second"))
    for name, row in result["contenders"].items():
        step, ratio, share = row["step_s"], row["speedup_of_ours"], row.get("share_of_product")
        rows.append(
            [
                name,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                *(["{median:.1%} ({low:.1%} - {high:.1%})".format(**share)] if share else []),
                f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})",
                f"{ratio['median']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f})",
                format_bytes(row["memory"]["steps"]),
                format_bytes(row["memory"]["whole"]),
                f"{row['started']['first_step_s']:.1f}",
                f"{row['loss']:.4f}",
            ]
        )
    header = ["contender", "tokens/s", "MFU", *(["of a bare product (quartiles)"] if has_shares else [])]
    header += ["step s: median (min - max)"]
    header += ["ours is x times as fast (quartiles)", "peak, steps", "peak, whole", "first step s", "loss"]
    notes = [f"MFU is of {result['peak_flops'] / 1e12:.4g} TFLOP/s, {result['peak_source']}", FIRST_STEP]
    if has_shares:
        rates = spread(rate / 1e9 for rate in result["product_flops_per_second"])
        notes.append(
            f"a bare product did {rates.median:,.0f} ({rates.min:,.0f} - {rates.max:,.0f}) GFLOP/s in its "
            "turns, of as many FLOPs as a step; a contender's share is of the same turn"
        )
    if result["work"]["device"] == "cpu":
        all_keep = result["work"].get("all_keep_memory")
        keeping = "everybody keeps" if all_keep else "ours keeps"
        notes.append(f"{keeping} freed memory for the next step (mallopt)")
    if "litgpt" in result["contenders"]:
        notes.append("litgpt has rotary positions, no learned ones, and starts from other weights")
    notes += [f"{name} failed and is left out: {why}" for name, why in result.get("failed", {}).items()]
    return "\n".join([table(header, rows), *notes, *versions_line(result.get("versions", {}))])


def main() -> None:
    with one_line_errors():
        config = parse(PeersConfig, default=PeersConfig())
        say_what_quick_leaves_out(
            config, "model", "batch_size", "block_size", "accumulation", "all_keep_memory"
        )
        work = work_of(config)
        say(f"{', '.join(contenders_of(config))}: {work}")
        result = compare(config)
        print(table_of(result))
        finish(result)


if __name__ == "__main__":
    main()
