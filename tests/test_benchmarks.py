"""Benchmarks at tiny sizes: they measure what they say, contenders do equal work, reports name kinds."""

import contextlib
import functools
import html
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import tyro
from matplotlib.figure import Figure

from benchmarks import (
    compare,
    contenders,
    data,
    dry_run,
    limit,
    parts,
    peers,
    pictures,
    predict,
    prepare,
    report,
    sharding,
    throughput,
)
from benchmarks.contenders import CONTENDERS, Work, batches_of, installed_contenders
from benchmarks.measure import choose_device, driver_version, facts, one_line_errors, read_json, spread, table
from benchmarks.plain import plain_gpt2
from benchmarks.worker import Memory, Served, Started, Worker, WorkerError
from nanogpt import loss, perf
from nanogpt.data import BatchSpec, MappedTokens, PreadTokens
from nanogpt.errors import UserError
from nanogpt.loss import next_token_loss
from nanogpt.meeting import World
from nanogpt.model import GPT2Config, apply, init
from nanogpt.optim import warmup_cosine

TINY = GPT2Config(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32)  # no padding: 256 = 2 x 128
WORK = Work(model=TINY, batch_size=2, accumulation=2, precision="float32", compile=False)


def test_the_plain_module_computes_the_same_loss() -> None:
    params = init(TINY, torch.Generator().manual_seed(0))
    batch = batches_of(WORK)[0]
    expected = next_token_loss(apply(params, batch.inputs[0], TINY), batch.targets[0])
    torch.testing.assert_close(plain_gpt2(TINY, params)(batch.inputs[0], batch.targets[0]), expected)


@pytest.mark.parametrize("name", [name for name in installed_contenders() if name not in ("ours", "litgpt")])
def test_a_contender_follows_ours_step_by_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a few steps of the benchmark's own schedule nothing would tell a wrong optimizer from a right one.
    steep = warmup_cosine(1e-2, final=1e-3, warmup_steps=1, total_steps=12)
    for setting, value in {"SCHEDULE": steep, "WEIGHT_DECAY": 5.0, "CLIP_NORM": 0.1}.items():
        monkeypatch.setattr(contenders, setting, value)
    ours, theirs = CONTENDERS["ours"](WORK), CONTENDERS[name](WORK)
    for batch in 3 * batches_of(WORK):
        # fp32 sums in another order, through AdamW
        torch.testing.assert_close(theirs(batch), ours(batch), rtol=1e-4, atol=0)


def test_a_ratio_is_of_the_same_turn_and_mfu_of_the_peak() -> None:
    started, memory = Started(0.0, 1.0, 1), Memory(2, 3)
    flops = WORK.tokens * perf.flops_per_token(TINY, 16)
    rates, seconds = [flops / 3.0, flops / 3.0, flops / 6.0], [3.0, 6.0, 9.0]
    row = peers.contender_result(WORK, 1e9, rates, seconds, [1.0, 3.0, 3.0], 5.0, started, memory)
    assert row["speedup_of_ours"]["median"] == 3.0
    assert row["tokens_per_second"] == WORK.tokens / 6.0
    assert row["mfu"] == pytest.approx(flops / 6.0 / 1e9)
    share = row["share_of_product"]  # a product of as many FLOPs took 3, 3 and 6 seconds in these turns
    assert (share["min"], share["median"], share["max"]) == pytest.approx((0.5, 2 / 3, 1.0))
    row = peers.contender_result(WORK, 1e9, [], seconds, seconds, 5.0, started, memory)
    assert row["share_of_product"] is None


@pytest.mark.parametrize(
    ("a_look_s", "products", "peak", "rows"), [(1.0, 4, 1e9, 4), (20.0, 1, 1e9, 4), (1.0, 8, 8.0, 2)]
)
def test_a_bare_product_does_as_many_flops_as_a_step_or_stops_after_30_s(
    a_look_s: float, products: int, peak: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that goes on by so much at each look: before, with each product, at the end.

    Where one product would take 6 s, it has half as many rows.
    """
    done, looks = [], itertools.count()
    monkeypatch.setattr(peers, "PRODUCT_SHAPE", (4, 2, 3))
    monkeypatch.setattr(peers, "step_flops", lambda work: 4 * 48)
    monkeypatch.setattr(torch, "mm", lambda *factors, out: done.append(out))
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: a_look_s * next(looks)))
    rate = peers.bare_product_rate(WORK, peak)
    assert [out.shape for out in done] == products * [(rows, 3)]
    assert rate == pytest.approx(products * 12 * rows / (a_look_s * (next(looks) - 1)))


def test_the_floor_adds_up_by_hand() -> None:
    work = replace(WORK, accumulation=1)
    names = [product.name for product in limit.products_of(TINY, 32)]
    floor = limit.floor_of(work, limit.Rates(dict.fromkeys(names, 1e6), 1e6))["seconds"]
    weights = 2 * 12 * 32 * 32 + 256 * 32  # two blocks and the head
    assert floor["matmul"] == pytest.approx(6 * weights * 32 / 1e6)
    assert floor["attention"] == pytest.approx(7 * 2 * 32 * 16 * 32 / 1e6)
    assert floor["optimizer"] == pytest.approx(7 * 4 * perf.parameter_count(TINY) / 1e6)


def test_other_work_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"plain's loss is 5\.1, ours 5\.0"):
        peers.check_equal_work({"ours": 5.0, "plain": 5.1}, WORK)


def test_a_worker_takes_turns_and_knows_its_memory() -> None:
    with Worker("ours", WORK) as worker:
        started, turn, memory = worker.start(), worker.turn(2), worker.memory()
    assert started.first_step_s > 0
    assert len(turn.seconds) == 2
    assert started.idle_bytes < memory.steps <= memory.whole


def test_a_failure_in_a_worker_reaches_us() -> None:
    with (
        Worker("ours", Work(model=TINY, precision="half", compile=False)) as worker,
        pytest.raises(WorkerError, match=r"(?s)ours failed:.*precision is 'half', expected one of"),
    ):
        worker.start()


def test_a_ctrl_c_in_the_terminal_is_for_whoever_started_a_process() -> None:
    with Served("somebody", dict) as served:
        pid = served._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)  # as early as may be: its imports are no better a moment than its work
        assert served.ask("get", "anything") is None
        os.kill(pid, signal.SIGINT)
        assert served.ask("get", "anything") is None


def test_a_benchmark_that_is_stopped_ends_without_a_traceback() -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130


def test_a_benchmark_that_is_terminated_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    for folder in ("temporary", "out"):
        Path(tmp_path, folder).mkdir()
    endless = "data --file-bytes 8388608 --batch-size 8 --total-batch-size 65536 --rounds 1000000"
    command = [sys.executable, "-m", "benchmarks.report", "--out", str(tmp_path / "out"), "--only", "data"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        [*command, "--arguments", endless], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        assert any("round 1" in line for line in process.stderr)
        assert [*Path(tmp_path, "temporary").iterdir()]
        process.terminate()
        process.stderr.read()  # until the benchmark, which has it too, has ended
    assert process.returncode == 128 + signal.SIGTERM
    assert not [*Path(tmp_path, "temporary").iterdir()]


def test_a_ctrl_c_ends_the_command_that_is_timed(tmp_path: Path) -> None:
    source = tmp_path / "corpus.txt"
    source.write_text("some text " * 2_000_000)  # takes seconds
    ctrl_c = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        prepare.command(source, tmp_path / "out", "tiktoken", 1)
    assert not Path(tmp_path, "out", "train.bin").exists()


def test_a_benchmark_whose_output_nobody_reads_ends_without_a_word() -> None:
    result = str(Path(report.__file__).parent / "reports/cpu-2-cores-amd-epyc.json")
    command = [sys.executable, "-m", "benchmarks.compare", result, result]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=100)) == ("", 1)


def test_a_process_that_has_ended_is_an_answer() -> None:
    with Served("nobody", dict) as served:
        served._process.kill()
        served._process.join()
        with pytest.raises(WorkerError, match="nobody ended with status -9, out of memory perhaps"):
            served.ask("keys")


FAILING_LITGPT = """
from types import SimpleNamespace
from torch import nn

class Config:
    def __init__(self, **shape):
        self.words = shape["padded_vocab_size"]

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.words, 8)})
        self.lm_head = nn.Linear(8, config.words, bias=False)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        assert self.calls <= 4, "no memory after the first turn"  # three steps come before it
        return self.lm_head(self.transformer.wte(inputs))
"""


def test_a_contender_that_is_named_twice_takes_part_once() -> None:
    config = peers.PeersConfig(contenders=("ours", "plain", "ours"))
    assert peers.contenders_of(config) == ["ours", "plain"]


def test_a_peer_that_fails_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("import an_older_hub")
    (tmp_path / "litgpt.py").write_text(FAILING_LITGPT)
    monkeypatch.syspath_prepend(tmp_path)  # where the contenders' processes look as well
    names = ("ours", "hugging_face", "litgpt")
    result = peers.compare(peers.PeersConfig(contenders=names, quick=True, turns=2, device="cpu"))
    assert list(result["contenders"]) == ["ours"]
    assert len(result["contenders"]["ours"]["seconds"]) == 2
    for note in (
        "hugging_face failed and is left out: ModuleNotFoundError: No module named 'an_older_hub'",
        "litgpt failed and is left out: AssertionError: no memory after the first turn",
    ):
        assert note in peers.table_of(result)


@pytest.mark.parametrize(
    ("package", "text", "why"),
    [
        ("broken_litgpt", "import an_older_hub", "No module named 'an_older_hub'"),
        ("lazy_litgpt", "def __getattr__(name): raise ImportError('no\\n' + name)", "no GPT"),
    ],
)
@pytest.mark.parametrize(
    "start",
    [
        lambda: limit.benchmark(limit.LimitConfig(contender="litgpt", quick=True)),
        lambda: throughput.benchmark(throughput.ThroughputConfig(contender="litgpt", quick=True)),
    ],
    ids=["limit", "throughput"],
)
def test_a_contender_alone_whose_package_is_broken_is_refused(
    start: Callable[[], Any],
    package: str,
    text: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / f"{package}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(contenders.PACKAGES, "litgpt", package)
    message = rf"package {package} cannot be imported \({why}\), expected it for .*, or leave litgpt out"
    with pytest.raises(UserError, match=message):
        start()


@pytest.mark.parametrize("reader", [MappedTokens, PreadTokens])
def test_the_loader_is_timed_over_a_whole_epoch(tmp_path: Path, reader: type) -> None:
    np.arange(2 + 8 * 64, dtype=np.uint16).tofile(tmp_path / "train.bin")
    spec = BatchSpec(block_size=8, batch_size=2, total_batch_size=32, seed=0)
    done = data.read_all(reader(tmp_path / "train.bin"), spec)
    assert (done.tokens, len(done.seconds)) == (512, 16)


def test_a_file_of_too_few_batches_is_refused(tmp_path: Path) -> None:
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "train.bin")
    spec = BatchSpec(block_size=8, batch_size=2, total_batch_size=16, seed=0)
    with pytest.raises(
        UserError, match="the file holds 2 batches, expected at least 4; set a larger --file-bytes"
    ):
        data.read_all(MappedTokens(tmp_path / "train.bin"), spec)


def test_a_file_of_too_few_batches_is_not_even_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "write_file", lambda path, size: pytest.fail("written"))
    monkeypatch.setattr(sys, "argv", ["data", "--file-bytes", "4000000"])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    assert capsys.readouterr().err.startswith("error: the file holds 3 batches, expected at least 4; set a ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--file-bytes 1000000000000000000",
            r"error: a file of 1000000\.0 TB has no room in \S+, which has \S+ \w+ free; set a smaller ",
        ),
        (
            "--quick --path {odd}",
            r"error: \S+/odd has 3 bytes, expected 2 for each token; set another --path, or leave it out",
        ),
        (
            "--path nowhere",
            "error: nowhere is no file with tokens in it; set another --path, or leave it out",
        ),
    ],
)
def test_a_file_that_cannot_be_there_is_a_sentence(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd").write_bytes(b"abc")
    monkeypatch.setattr(data, "write_file", lambda path, size: pytest.fail("written"))
    monkeypatch.setattr(sys, "argv", ["data", *flags.format(odd=tmp_path / "odd").split()])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    assert re.match(message, capsys.readouterr().err)


def test_a_written_file_has_the_size_asked_for_and_ids_of_the_vocabulary(tmp_path: Path) -> None:
    data.write_file(tmp_path / "train.bin", 1_000_002)
    ids = np.fromfile(tmp_path / "train.bin", dtype=np.uint16)
    assert (len(ids), ids.max() < data.VOCAB_SIZE) == (500_001, True)


def test_products_are_six_flops_for_each_weight_and_token() -> None:
    config = GPT2Config.named("gpt2")
    weights = 12 * 12 * 768**2 + config.padded_vocab_size * 768
    assert sum(product.flops for product in limit.products_of(config, 1024)) == 6 * weights * 1024


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::mm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::baddbmm_", "attention"),
        ("aten::_softmax", "attention"),
        ("nanogpt::gradients_by_products", "attention"),
        ("ampere_bf16_s16816gemm_bf16_128x128", "matmul"),
        ("aten::_log_softmax", "loss"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::gelu", "elementwise"),
        ("graph_0_cpp_fused__to_copy_add_native_layer_norm_2", "elementwise"),
        ("graph_2_cpp_fused_add_clone_div_lerp_mul_sqrt_0", "optimizer"),
        ("triton_red_fused_logsumexp_masked_fill_1", "loss"),
        ("graph_1_cpp_fused__to_copy_add_amax_arange_eq_exp_gather_log_lt_mul_0", "loss"),
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_bias_NNN", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "attention"),
        ("void at::native::(anonymous namespace)::sum_and_scatter<float, long>", "elementwise"),
        ("triton_red_fused__to_copy_exp_prepare_softmax_online_1", "loss"),
        ("triton_poi_fused_add_copy__div_lerp_mul_neg_sqrt_0", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor<float>>", "optimizer"),
        ("Torch-Compiled Region: 0/0", "around graphs"),
        ("CompiledFunctionBackward", "around graphs"),
    ],
)
def test_an_operator_belongs_to_a_group(name: str, group: str) -> None:
    assert limit.group_of(name) == group


def test_the_breakdown_is_of_one_step_and_counts_no_time_twice() -> None:
    # Large enough for operators, between which there are Python and the checks of the tests' shapes.
    model = GPT2Config(vocab_size=2048, block_size=256, n_layer=2, n_head=4, n_embd=256)
    found = limit.breakdown(replace(WORK, model=model, batch_size=4, accumulation=1), "ours", steps=3)
    groups, step_s = found["groups_s"], found["profiled_step_s"]
    work_s = sum(groups.values()) - groups["idle"]
    assert found["step_s"] == spread(found["seconds"])._asdict()
    assert 0.3 * step_s < work_s < 1.05 * step_s
    assert groups["matmul"] > 0


def test_one_gpu_waits_for_no_other() -> None:
    config = GPT2Config.named("gpt2")
    assert predict.all_reduce_s(config, predict.Machine("H100", 1)) == 0
    ring = predict.all_reduce_s(config, predict.Machine("H100", 8))
    assert ring == pytest.approx(2 * 7 / 8 * 4 * perf.parameter_count(config) / (0.7 * 450e9))
    # Each GPU sums an eighth with its like on the other node, by an adapter of its own.
    across = 4 * perf.parameter_count(config) / 8 / (0.7 * 50e9)
    assert predict.all_reduce_s(config, predict.Machine("H100", 16, 2)) == pytest.approx(ring + across)


def test_what_others_said_is_never_a_measurement() -> None:
    rows = predict.benchmark(predict.PredictConfig(quick=True))["rows"]
    assert {row["kind"] for row in rows} == {"published", "claimed", "predicted"}
    assert {row["kind"] for row in rows if row["who"] == "claimed for this project"} == {"claimed"}
    assert all("off by up to" in row["note"] for row in rows if row["kind"] == "predicted")


ZEN4 = {"device": "cpu", "hardware": "AMD EPYC", "cores": 2, "memory_bytes": 25276063744, "bf16_fast": True}
ZEN3 = ZEN4 | {"bf16_fast": False}
H100 = ZEN4 | {"device": "cuda", "hardware": "NVIDIA H100 80GB HBM3", "memory_bytes": 85017493504}


def measured_on_an_h100(benchmark: str) -> dict[str, Any]:
    """A result of throughput or peers with 500,000 tokens a second for GPT-2, and some that do not count."""
    gpt2, xl = ({"model": asdict(GPT2Config.named(name))} for name in ("gpt2", "gpt2-xl"))
    rows = [
        {"tokens_per_second": 4e5, "work": gpt2 | {"batch_size": 32}, "memory": {"steps": 90}},
        {"tokens_per_second": 5e5, "work": gpt2 | {"batch_size": 64}, "memory": {"steps": 25_000_000_000}},
        {"tokens_per_second": 9e5, "work": xl},
        {"tokens_per_second": 9e5, "work": gpt2, "ranks": 2},
        {"error": "out of memory"},
    ]
    peers_of = {"work": rows[1]["work"], "contenders": {"ours": rows[1]}}
    found = {"throughput": {"rows": rows}, "peers": peers_of}
    return {"benchmark": benchmark, "facts": {"hardware": "NVIDIA H100 80GB HBM3"}} | found[benchmark]


@pytest.mark.parametrize("benchmark", ["throughput", "peers"])
def test_a_measured_rate_stands_beside_the_prediction_with_its_error(tmp_path: Path, benchmark: str) -> None:
    measured = measured_on_an_h100(benchmark)
    path = tmp_path / "measured.json"
    for text in (json.dumps(measured), json.dumps({"benchmark": "report", "results": {benchmark: measured}})):
        path.write_text("a table\n" + text)
        result = predict.benchmark(predict.PredictConfig(measured=path, quick=True))
        (row,) = [row for row in result["rows"] if row["kind"] == "measured"]
        assert (row["machine"], row["tokens_per_second"]) == ("1x H100", 5e5)
        assert "the model is off by +" in row["note"]
        (peak,) = [row for row in result["memory"] if row["kind"] == "measured"]
        (planned,) = [row for row in result["memory"] if row not in (peak,) and row["machine"] == "1x H100"]
        assert (peak["machine"], peak["total_bytes"]) == ("1x H100", 25_000_000_000)
        error = planned["total_bytes"] / 25_000_000_000 - 1
        assert peak["note"] == f"{path}; the formula is off by {error:+.1%}"
        assert "MEASURED   1x H100              1 x 1  25.0 GB" in predict.table_of(result)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"facts": {"hardware": "AMD EPYC"}}, "it is of AMD EPYC, and the model knows A100 and H100"),
        *(
            (
                {"rows": [row]},
                "it has no step of GPT-2 124M with 1,024 tokens in half precision on one GPU",
            )
            for row in (
                {"error": "out of memory"},
                {"tokens_per_second": 2e5, "work": asdict(Work(precision="float32", device="cuda"))},
            )
        ),
    ],
)
def test_a_measurement_that_is_not_in_the_table_is_named(
    changed: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured_on_an_h100("throughput") | changed))
    result = predict.benchmark(predict.PredictConfig(measured=path, quick=True))
    assert {row["kind"] for row in result["rows"] + result["memory"]} == {"published", "claimed", "predicted"}
    assert f"{path} is not in the table: {why}\n" in predict.table_of(result)


def test_several_gpus_are_as_fast_as_one_was_less_what_the_ring_shows(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured_on_an_h100("throughput")))
    # Each of 8 has 65,536 tokens, 0.131 s; the ring of 2 x 7/8 x 498 MB at 315 GB/s takes 2.8 ms of that.
    rows = predict.benchmark(predict.PredictConfig(measured=path, quick=True))["rows"]
    own = {row["machine"]: row for row in rows if row["who"] == "ours"}
    assert {row["kind"] for name, row in own.items() if name != "1x H100"} == {"predicted"}
    assert own["8x H100"]["tokens_per_second"] == pytest.approx(8 * 5e5)
    # With 2 x 1,024 tokens each the last backward pass of 1.4 ms hides half of it.
    config = predict.PredictConfig(measured=path, quick=True, batch_size=1, total_batch_size=16 * 1024)
    own = {row["machine"]: row for row in predict.benchmark(config)["rows"] if row["who"] == "ours"}
    compute_s, ring_s = 2048 / 5e5, 2 * 7 / 8 * 4 * 124_439_808 / (0.7 * 450e9)
    expected = 16 * 1024 / (compute_s + ring_s - compute_s / 2 * 2 / 3)
    assert own["8x H100"]["tokens_per_second"] == pytest.approx(expected)


def test_the_models_error_is_that_on_the_step_that_ran_whatever_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured_on_an_h100("throughput")))
    usual, other = (
        predict.benchmark(predict.PredictConfig(measured=path, quick=True, **asked))
        for asked in ({}, {"batch_size": 1, "total_batch_size": 16 * 1024})
    )
    # llm.c: 524,288 tokens over 8 GPUs, whose ring is hidden. Here: a step of 64 x 1,024, with its update.
    model, h100 = GPT2Config.named("gpt2"), predict.GPUS["H100"]
    seconds = predict.microstep_s(model, 65_536, h100) + predict.optimizer_s(model, h100)
    assert usual["model_error"]["llm.c, 8x H100"] == pytest.approx(8 * 65_536 / seconds / (10e9 / 2700) - 1)
    assert other["model_error"] == usual["model_error"]
    for result in (usual, other):
        (note,) = [row["note"] for row in result["rows"] if row["kind"] == "measured"]
        assert note == f"{path}; the model is off by {65_536 / seconds / 5e5 - 1:+.0%}"


def test_a_change_within_the_noise_is_none() -> None:
    before = spread([1.0, 1.1, 1.2])._asdict()
    assert compare.verdict("step_s", before, spread([1.05, 1.15, 1.25])._asdict()) == "same"
    assert compare.verdict("step_s", before, spread([1.5, 1.6, 1.7])._asdict()) == "worse"
    assert compare.verdict("tokens_per_second", before, spread([1.5, 1.6, 1.7])._asdict()) == "better"


def test_a_few_measurements_have_to_lie_far_apart() -> None:
    few, more = spread([1.0, 1.01]), spread([1.05, 1.06])
    assert compare.verdict("step_s", few._asdict(), more._asdict()) == "same"
    assert compare.verdict("step_s", few._asdict(), spread([1.2, 1.3])._asdict()) == "worse"
    many, later = spread([1.0, 1.01] * 3), spread([1.05, 1.06] * 3)
    assert compare.verdict("step_s", many._asdict(), later._asdict()) == "worse"
    for name in ("speedup", "share_of_product"):
        assert compare.verdict(f"contenders/ours/{name}", many._asdict(), later._asdict()) == "better"


def test_quartiles_of_five_measurements_lie_apart_by_chance() -> None:
    before, after = spread([1.00, 1.01, 1.02, 1.03, 1.20]), spread([1.02, 1.10, 1.11, 1.12, 1.13])
    assert before.high < after.low
    assert compare.verdict("step_s", before._asdict(), after._asdict()) == "same"
    before, after = (spread([*side] * 2)._asdict() for side in ([1.00, 1.01, 1.02], [1.06, 1.07, 1.08]))
    assert compare.verdict("step_s", before, after) == "worse"
    before, after = (spread([*side, 1.04] * 4)._asdict() for side in ([1.00, 1.01, 1.02], [1.06, 1.07, 1.08]))
    assert compare.verdict("step_s", before, after) == "worse"


def test_a_few_megabytes_are_what_a_process_gains_by_itself() -> None:
    def verdict(before: float, after: float, path: str) -> str:
        return compare.verdict(path, spread([before])._asdict(), spread([after])._asdict())

    assert verdict(160e3, 4e6, "readers/pread/peak_growth_bytes") == "same"
    assert verdict(160e3, 7e6, "readers/pread/peak_growth_bytes") == "worse"
    assert verdict(0, 4e6, "readers/mapped/peak_growth_bytes") == "same"
    assert verdict(0, 7e6, "readers/mapped/peak_growth_bytes") == "worse"
    assert verdict(0, 0, "readers/mapped/peak_growth_bytes") == "same"
    assert verdict(3e9, 3.5e9, "rows/1/memory/steps") == "worse"
    assert verdict(3e9, 3.5e9, "rows/tiktoken 2 workers/peak_bytes") == "worse"
    assert verdict(3e6, 4e6, "rows/tiktoken 2 workers/peak_bytes") == "same"
    assert verdict(160e3, 4e6, "tokens_per_second") == "better"


def test_results_without_a_common_number_are_refused() -> None:
    one, other = ({"benchmark": "data", name: spread([1.0])._asdict()} for name in "ab")
    with pytest.raises(UserError, match="no number in common"):
        compare.compare(one, other)
    with pytest.raises(UserError, match="no number in common"):
        compare.compare({"benchmark": "data"}, other)
    with pytest.raises(
        UserError, match="neither has a number that was measured several times, as predictions"
    ):
        compare.compare({"benchmark": "predict"}, {"benchmark": "predict"})


def test_a_report_of_failures_is_a_page() -> None:
    about = facts("cpu") | {"commit": "0123456789abcdef+"}
    row = {"work": asdict(WORK), "error": "out of memory"}
    result = {"benchmark": "throughput", "facts": about, "rows": [row, row]}
    written = {"benchmark": "report", "facts": about, "results": {"throughput": result}}
    page, text = report.page_of(written), report.markdown_of(written)
    assert page.count("out of memory") == text.count("out of memory") == 2
    assert "commit 0123456789ab+" in page
    assert "commit 0123456789ab+" in text
    assert "<svg" not in page
    assert report.failures_of(written, ("throughput",)) == ["throughput"]
    result["rows"] = [row, throughput.row_of(WORK, [2.0], {"steps": 1, "whole": 2}, 3.0)]
    assert report.failures_of(written, ("throughput",)) == []


def test_rows_are_compared_by_their_work_wherever_they_stand() -> None:
    def result(*rows: tuple[int, float]) -> dict:
        model = {"n_layer": 12, "n_embd": 768, "block_size": 1024}
        work = {"model": model, "precision": "float32", "attention": "auto", "compile": True}
        step = [spread([seconds])._asdict() for _, seconds in rows]
        return {
            "benchmark": "throughput",
            "rows": [
                {"work": work | {"batch_size": size}, "step_s": s}
                for (size, _), s in zip(rows, step, strict=True)
            ],
        }

    entries = compare.compare(result((1, 1.0), (2, 2.0)), result((2, 3.0)))
    assert [(entry["number"], entry["verdict"]) for entry in entries] == [
        ("rows/12x768 2x1024 float32 auto compiled/step_s", "worse")
    ]


def test_what_was_not_asked_for_in_the_same_way_is_named() -> None:
    one = {"benchmark": "parts", "work": {"tokens": 1024, "new_tokens": 16}}
    other = {"benchmark": "parts", "work": {"new_tokens": 32, "precision": "bfloat16"}}
    assert list(compare.other_work(one, other)) == [("parts", "new_tokens 16 and 32")]
    reports = (
        {"benchmark": "report", "results": {"parts": part, name: {}}}
        for part, name in ((one, "a"), (other, "b"))
    )
    assert list(compare.other_work(*reports)) == [("parts", "new_tokens 16 and 32")]
    meshes = ({"benchmark": "throughput", "mesh": {"shard": shards}} for shards in (1, 2))
    assert list(compare.other_work(*meshes)) == [("throughput", "shard 1 and 2")]
    files = ({"benchmark": "data", "file_bytes": size} for size in (1, 2))
    assert list(compare.other_work(*files)) == [("data", "file_bytes 1 and 2")]
    failed = {"benchmark": "limit", "error": "python -m benchmarks.limit ended with status 1"}
    assert not list(compare.other_work({"benchmark": "limit", "contender": "ours"}, failed))
    peer = ({"benchmark": "peers", "versions": {"transformers": version}} for version in ("4.9", "5.0"))
    assert list(compare.other_work(*peer)) == [("peers", "transformers 4.9 and 5.0")]


def test_a_number_of_a_report_says_whose_it_is() -> None:
    def named(keep: bool) -> str:
        memory = {"steps": 3_500_000_000}
        result = {
            "work": asdict(replace(WORK, all_keep_memory=keep)),
            "contenders": {"ours": {"memory": memory}},
        }
        ((path, point),) = compare.spreads({"results": {"peers": result}})
        assert point["median"] == 3_500_000_000
        return path

    work = "2x32 2x16 float32 auto eager x 2"
    assert named(False) == f"/results/peers {work}/contenders/ours/memory/steps"
    assert named(True) == f"/results/peers {work} and all keep memory/contenders/ours/memory/steps"
    assert compare.shown(named(False), 3_500_000_000) == "3.5 GB"


def test_results_of_two_benchmarks_are_not_compared() -> None:
    with pytest.raises(
        UserError, match="a result of data and one of peers, expected two of the same benchmark"
    ):
        compare.compare({"benchmark": "data"}, {"benchmark": "peers"})


def test_a_file_without_the_result_names_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"benchmark": "data", "facts": {}}')
    config = predict.PredictConfig(measured=path, quick=True)
    with pytest.raises(UserError, match=r"json holds no result of .*; run python -m benchmarks\.throughput"):
        predict.benchmark(config)
    for text in (b"no json", b"\xff"):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"json cannot be read as a result \(.*\); give a benchmark's"):
            predict.benchmark(config)
    for text, message in {
        "[1]": "json holds a list, no result; give a benchmark's output",
        '{"tokens": 5}': "json names no benchmark, so it is no result of one; give a benchmark's output",
        '{"benchmark": ["data"]}': "json names no benchmark, so it is no result of one; give a benchmark's",
        '{"benchmark": "data", "loss": NaN}': r"json cannot be read as a result \(NaN is no number\); give",
        '{"benchmark": "report", "results": []}': "json is a report without results; give another",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            predict.benchmark(config)


def test_a_damaged_result_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = report.REPORTS / "gpu-nvidia-h100-80gb-hbm3.json"
    found = json.loads(whole.read_text())
    peers_of = found["results"]["peers"]
    for name, results in {
        "limit": {"limit": peers_of},
        "peers": {"peers": peers_of | {"work": 5}},
        "no_work": found["results"] | {"predict": None},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found | {"results": results}))
    for program, flags, whose, why in (
        (report, f"--render {tmp_path}/limit.json", "limit.json", "KeyError: 'floor'"),
        (predict, f"--quick --measured {tmp_path}/peers.json", "peers.json", "TypeError: 'int' object"),
        (
            compare,
            f"{whole} {tmp_path}/no_work.json",
            f"{whole} or {tmp_path}/no_work.json",
            "AttributeError: ",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
        with pytest.raises(SystemExit, match="2"):
            program.main()
        assert f"{whose} is not as a benchmark writes it ({why}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["limit.json", "no_work.json", "peers.json"]


def test_a_mistake_in_a_measured_file_does_not_wait_for_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "plan", lambda *_: pytest.fail("planned"))
    with pytest.raises(UserError, match="nowhere cannot be read as a result"):
        predict.benchmark(predict.PredictConfig(measured=Path("nowhere")))


@pytest.mark.parametrize(
    ("program", "flags", "next_function", "unused"),
    [
        (throughput, "--batch-size 3 --starts --steps 2", "benchmark", "--batch-size, --starts"),
        (peers, "--turns 2 --all-keep-memory", "compare", "--all-keep-memory"),
        (limit, "--block-size 128 --model gpt2-xl", "benchmark", "--block-size, --model"),
        (parts, "--model gpt2-xl", "benchmark", "--model"),
        (data, "--rounds 3 --block-size 128", "write_file", "--rounds"),
        (prepare, "--workers 1", "source_texts", "--workers"),
        (sharding, "--turns 3", "benchmark", "--turns"),
        (sharding, "--shard 3", "benchmark", ""),
    ],
)
def test_quick_says_what_it_does_not_use(
    program: ModuleType,
    flags: str,
    next_function: str,
    unused: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, next_function, stop)
    for quick in (["--quick"], []):
        monkeypatch.setattr(sys, "argv", ["benchmark", *quick, *flags.split()])
        with pytest.raises(SystemExit, match="130"):
            program.main()
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--quick")]
        expected = f"--quick has sizes of its own, so {unused} is not used"
        assert said == ([expected] if quick and unused else [])


def test_the_rate_of_another_contender_is_not_taken_for_ours(tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(measured_on_an_h100("throughput") | {"contender": "plain"}))
    with pytest.raises(UserError, match=r"plain\.json has the steps of plain, expected ours; run python -m"):
        predict.benchmark(predict.PredictConfig(measured=path, quick=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"benchmark": "peers", "facts": {}}',
            "mine.json is a result of peers, expected that of benchmarks.report",
        ),
        (
            '{"benchmark": "report", "results": {}}',
            "mine.json does not say where it was measured; set another",
        ),
    ],
)
@pytest.mark.parametrize("flags", ["--render {path}", "--out {folder} --name mine --only data"])
def test_pages_are_only_made_of_a_report(
    flags: str,
    text: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    monkeypatch.setattr(report, "run_benchmark", lambda name, arguments: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["report", *flags.format(path=path, folder=tmp_path).split()])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert message in capsys.readouterr().err
    assert ([*tmp_path.iterdir()], path.read_text()) == ([path], text)


def test_a_report_is_one_page_with_the_command_of_each_number(tmp_path: Path) -> None:
    results = {
        "limit": limit.benchmark(limit.LimitConfig(quick=True, steps=1)),
        "parts": parts.benchmark(parts.PartsConfig(quick=True, tokens=64, new_tokens=2, repeats=2)),
        "predict": predict.benchmark(predict.PredictConfig(quick=True)),
        "sharding": sharding.benchmark(sharding.ShardingConfig(quick=True, dry_run=True)),
        "data": {"benchmark": "data", "error": "python -m benchmarks.data ended with status 1"},
    }
    written = {"benchmark": "report", "facts": results["limit"]["facts"], "results": results}
    timings = results["parts"]["timings_s"]
    assert results["parts"]["seconds"] == {name: spread(values)._asdict() for name, values in timings.items()}
    paths = {path.suffix: path.read_text() for path in report.write(written, tmp_path, "here")}
    assert json.loads(paths[".json"])["results"].keys() == results.keys()
    page = paths[".html"]
    assert page.count("<svg") == 4
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(names)
    for text in (page, paths[".md"]):
        assert "python -m benchmarks.data ended with status 1" in text
        assert "PREDICTED" in text
        assert text.count("load average") == 4


@pytest.mark.parametrize(("limit_s", "ending"), [(600, None), (0.01, "error: the report has no result")])
def test_a_report_ends_with_1_where_a_benchmark_failed_and_is_written_all_the_same(
    limit_s: float,
    ending: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "COMMAND_LIMIT_S", limit_s)
    argv = ["report", "--quick", "--only", "predict", "--out", str(tmp_path), "--name", "mine"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=ending) if ending else contextlib.nullcontext():
        report.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "mine.json", "mine.md"]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["predict"]
    assert ("error" in result) == bool(ending)


@pytest.mark.parametrize("path", sorted(report.REPORTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_text_is_that_of_the_committed_numbers(path: Path) -> None:
    page = path.with_suffix(".html").read_text()
    render = f"python -m benchmarks.report --render benchmarks/reports/{path.name}"
    found = report.read_report(path)
    assert path.with_suffix(".md").read_text() == report.markdown_of(found), render
    for _, _, text in report.sections_of(found):
        assert f"<pre>{html.escape(text)}</pre>" in page, render


def test_a_table_names_the_versions_of_others_where_they_are_known() -> None:
    results = report.read_report(report.REPORTS / "cpu-2-cores-amd-epyc-bf16.json")["results"]
    versions = {"transformers": "5.1", "litgpt": None}
    assert peers.table_of(results["peers"] | {"versions": versions}).splitlines()[-1] == "transformers 5.1"
    assert prepare.table_of(results["prepare"] | {"versions": {"numpy": "2.4", "tiktoken": "0.14"}}).endswith(
        "\nnumpy 2.4, tiktoken 0.14"
    )


def test_a_range_in_the_picture_is_of_the_steps_of_the_rate_in_its_middle() -> None:
    axes = Figure().subplots()
    row = throughput.row_of(WORK, [2.0, 3.0, 6.0], {"steps": 1, "whole": 2}, 3.0, ranks=2)
    pictures.draw_speed(axes, {"rows": [row]})
    tokens = 2 * WORK.accumulation * WORK.batch_size * TINY.block_size
    assert row["tokens_per_second"] == tokens / 3.0
    ((_, slowest), (_, fastest)) = axes.collections[0].get_paths()[0].vertices
    assert (slowest, fastest) == pytest.approx((tokens / 6.0, tokens / 2.0))


def test_the_roofline_says_what_is_measured() -> None:
    axes = Figure().subplots()
    results = report.read_report(report.REPORTS / "cpu-2-cores-amd-epyc-bf16.json")["results"]
    pictures.draw_roofline(axes, results["limit"])
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "measured product",
        "measured memory bandwidth, and the best product",
    ]


def test_a_table_shows_several_microsteps() -> None:
    rows = [
        throughput.row_of(replace(WORK, accumulation=count), [2.0], {"steps": 1, "whole": 2}, 3.0)
        for count in (1, 4)
    ]
    rows = throughput.with_mfu(rows, {WORK.precision: (1e9, "a peak")})
    _, _, one, four, *_ = throughput.table_of({"rows": rows}).splitlines()
    assert "  2 x 16  " in one
    assert " 2 x 16 x 4 " in four


def test_a_picture_tells_models_and_precisions_apart() -> None:
    rows = [
        throughput.row_of(replace(WORK, **changed), [2.0], {"steps": 1, "whole": 2}, 3.0)
        for changed in ({}, {"model": replace(TINY, n_layer=1)}, {"precision": "bfloat16"})
    ]
    speed, memory = Figure().subplots(), Figure().subplots()
    pictures.draw_speed(speed, {"rows": rows})
    assert [label.split(",")[0] for label in speed.get_legend_handles_labels()[1]] == [
        "2 x 32",
        "1 x 32",
        "2 x 32",
    ]
    pictures.draw_memory(memory, {"rows": rows})
    assert [label.get_text() for label in memory.get_xticklabels()] == [
        "2 x 16 eager float32 of 2 x 32",
        "2 x 16 eager float32 of 1 x 32",
        "2 x 16 eager bfloat16 of 2 x 32",
    ]
    assert {bar.get_hatch() for bar in memory.patches} == {"///"}  # what is planned was not measured


def test_a_report_keeps_what_it_has_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_benchmark(name: str, arguments: str) -> dict[str, str]:
        if name == "peers":
            raise KeyboardInterrupt
        return {"benchmark": name, "arguments": arguments}

    monkeypatch.setattr(report, "run_benchmark", run_benchmark)
    config, path = report.ReportConfig(only=("throughput", "predict", "peers")), tmp_path / "a" / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        report.measure(config, H100, path)
    results = read_json(path)["results"]
    assert results.keys() == {"throughput", "predict"}
    assert results["predict"]["arguments"] == f"--measured {os.path.relpath(path)}"


def test_a_full_disk_costs_a_report_nothing_that_it_had(tmp_path: Path) -> None:
    older = report.REPORTS / "cpu-2-cores-amd-epyc-bf16.json"
    path = tmp_path / older.name
    path.write_text(older.read_text())
    results = report.read_report(path)["results"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # the next file ends there
    try:
        with pytest.raises(OSError, match="too large"):
            report.write(report.read_report(path), tmp_path, path.stem)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert report.read_report(path)["results"] == results


def test_a_folder_that_takes_no_file_is_refused_before_anything_is_measured() -> None:
    config, path = report.ReportConfig(only=("predict",), quick=True), Path("/proc/here.json")
    with pytest.raises(UserError, match=r"cannot write to /proc \(.*\), expected .*; set another --out"):
        report.measure(config, ZEN4, path)


def test_arguments_that_a_benchmark_refuses_cost_a_report_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "here.json"
    older = {
        "benchmark": "report",
        "facts": ZEN4,
        "results": {"predict": {"benchmark": "predict", "rows": []}},
    }
    path.write_text(json.dumps(older))
    config = report.ReportConfig(only=("predict",), arguments=("predict --quick --batch-size 0",))
    with pytest.raises(
        UserError,
        match=r"predict --quick --batch-size 0 ended with status 2 for the reason above, .* set --arg",
    ):
        report.measure(config, ZEN4, path)
    assert "error: batch size is 0, expected at least 1; set --batch-size" in capfd.readouterr().err
    assert read_json(path) == older


def test_predictions_made_elsewhere_leave_the_report_that_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "run_benchmark", lambda name, arguments: {"arguments": arguments})
    path = tmp_path / "gpu.json"
    report.measure(report.ReportConfig(only=("peers",)), H100, path)
    again = report.measure(report.ReportConfig(only=("predict",)), ZEN3, path)
    assert again["facts"] == H100
    assert again["results"]["predict"]["arguments"] == f"--measured {os.path.relpath(path)}"


@pytest.mark.parametrize(
    ("about", "quick", "name"),
    [
        (ZEN3, False, "cpu-2-cores-amd-epyc"),
        (ZEN4, False, "cpu-2-cores-amd-epyc-bf16"),
        (ZEN4, True, "cpu-2-cores-amd-epyc-bf16-quick"),
        (H100, False, "gpu-nvidia-h100-80gb-hbm3"),
        (H100, True, "gpu-nvidia-h100-80gb-hbm3-quick"),
    ],
)
def test_a_report_has_a_name_of_its_own(about: dict[str, Any], quick: bool, name: str) -> None:
    assert report.name_of(about, quick=quick) == name


def test_a_report_is_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = tmp_path / "here.json", []

    def run_benchmark(name: str, arguments: str) -> dict[str, str]:
        ran.append(name)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return {"benchmark": name}

    monkeypatch.setattr(report, "run_benchmark", run_benchmark)
    report.measure(report.ReportConfig(only=("peers", "limit")), ZEN3, path)
    before = path.read_bytes()
    with pytest.raises(
        UserError,
        match=r"here\.json has bf16_fast False, expected bf16_fast True as here, since its limit would stay; "
        "set another --name, or leave --only out",
    ):
        report.measure(report.ReportConfig(only=("peers",)), ZEN4, path)
    assert (path.read_bytes(), ran) == (before, ["peers", "limit"])
    with pytest.raises(KeyboardInterrupt):  # what is measured anew goes at once
        report.measure(report.ReportConfig(only=("peers", "limit")), ZEN4, path)
    assert read_json(path) == {
        "benchmark": "report",
        "facts": ZEN4,
        "results": {"peers": {"benchmark": "peers"}},
    }


def test_a_report_is_of_one_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "run_benchmark", lambda name, arguments: {"benchmark": name})
    path = tmp_path / "here.json"
    report.measure(report.ReportConfig(only=("peers", "limit")), ZEN4 | {"torch": "2.9", "threads": 2}, path)
    for changed in ({"torch": "2.10", "threads": 2}, {"torch": "2.9", "threads": 1}):
        with pytest.raises(UserError, match=r"has (torch 2\.9|threads 2), .* since its limit would stay"):
            report.measure(report.ReportConfig(only=("peers",)), ZEN4 | changed, path)


@pytest.mark.parametrize("quick", [False, True])
def test_a_report_measures_the_device_that_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    commands: dict[str, str] = {}
    monkeypatch.setattr(
        report, "run_benchmark", lambda name, arguments: commands.update({name: arguments}) or {}
    )
    for about in (ZEN4, H100):  # a CPU's report may be made where there is a GPU as well
        config = report.ReportConfig(quick=quick, arguments=("data --rounds 1",))
        report.measure(config, about, tmp_path / f"{about['device']}.json")
        named = {name for name, arguments in commands.items() if f"--device {about['device']}" in arguments}
        assert named == {"throughput", "peers", "limit", "parts"}
        assert [name for name in commands if "--quick" in commands[name]] == [
            name for name in report.TITLES if quick and name != "data"
        ]
        assert commands["data"] == "--rounds 1"


@pytest.mark.parametrize(
    ("memory_bytes", "batch_size", "sizes"),
    [(H100["memory_bytes"], 64, "64 32 16"), (42e9, 32, "32 16 8"), (16.9e9, 8, "8 4 2"), (1e9, 4, "4 2 1")],
)
def test_a_report_of_a_gpu_asks_for_what_all_peers_have_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: float, batch_size: int, sizes: str
) -> None:
    monkeypatch.setattr(report, "run_benchmark", lambda name, arguments: {"arguments": arguments})
    config = report.ReportConfig(only=("throughput", "peers", "limit", "parts"))
    results = report.measure(config, H100 | {"memory_bytes": memory_bytes}, tmp_path / "gpu.json")["results"]
    starts = {
        "throughput": f"--device cuda --batch-size {sizes} --attention",
        "peers": f"--device cuda --batch-size {batch_size} --block-size 1024",
        "limit": f"--device cuda --batch-size {batch_size} --block-size 1024",
        "parts": f"--device cuda --tokens {1024 * batch_size}",
    }
    for name, start in starts.items():
        assert results[name]["arguments"].startswith(start)


def test_a_benchmark_of_a_report_can_be_given_other_arguments() -> None:
    texts = ("peers --turns 6 --device cuda", "data --quick")
    config = tyro.cli(report.ReportConfig, args=["--arguments", *texts])
    assert config.own_arguments == {"peers": "--turns 6 --device cuda", "data": "--quick"}


def test_a_dry_run_counts_the_rows_that_each_rank_holds() -> None:
    uneven = replace(TINY, n_embd=34, vocab_size=7)  # 3 shards: 34 rows are 12 + 12 + 10, 7 are 3 + 3 + 1
    plan = dry_run.plan(replace(WORK, model=uneven), (1, 3))
    shapes = dict(uneven.skeleton.named_parameters()).values()
    rows = sum(-(-leaf.shape[0] // 3) * leaf[0].numel() for leaf in shapes)
    assert plan.rest["parameters"] == plan.peak_of_kind["gradients"] == 4 * rows
    assert plan.rest["moments"] == 2 * 4 * rows
    assert plan.at_peak["activations"] > 0


def test_a_dry_run_has_as_many_logits_at_a_time_as_the_step_that_it_is_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, tokens in {"DEFAULT_CHUNK_TOKENS": 8, "GPU_CHUNK_TOKENS": 32}.items():
        monkeypatch.setattr(loss, name, tokens)
    cpu, gpu = (
        dry_run.plan(replace(WORK, device=device), (1, 2)).peak_of_kind["logits of a chunk"]
        for device in ("cpu", "cuda")
    )
    # Beside logits, a chunk has gradients of its rows.
    assert gpu - cpu == pytest.approx(24 * TINY.vocab_size * perf.BYTES_PER_EAGER_LOGIT, rel=0.05)


def test_a_dry_run_alone_is_of_gpus_and_a_checked_one_of_this_machine() -> None:
    alone, checked = (
        sharding.work_of(sharding.ShardingConfig(dry_run=True, check=check)) for check in (False, True)
    )
    assert (alone.device, alone.precision, checked.device) == ("cuda", "bfloat16", "cpu")
    memory = {
        "rest": {},
        "at_peak": {},
        "peak_of_kind": {},
        "predicted_bytes": 1,
        "reshard_after_forward": False,
    }
    for work, on in ((alone, "bfloat16 on GPUs"), (checked, checked.precision)):
        result = {"layout": {"replicate": 1, "shard": 2}, "work": asdict(work), "memory": [memory, memory]}
        assert sharding.table_of(result).splitlines()[0].endswith(f"microstep, {on}")


def test_predicted_memory_of_several_gpus_is_of_a_gpus_step(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    def plan(work: Work, layout: tuple[int, int]) -> dry_run.Plan:
        planned.append((work.device, work.precision, layout))
        return dry_run.Plan({}, {"activations": 1}, {})

    monkeypatch.setattr(dry_run, "plan", plan)
    predict.memory_rows(GPT2Config.named("gpt2"), 64, quick=False)
    assert planned == [("cuda", "bfloat16", (1, 8)), ("cuda", "bfloat16", (2, 8))]


def test_resharding_holds_one_block_at_a_time_in_a_dry_run() -> None:
    work = replace(WORK, model=replace(TINY, n_layer=4))
    kept, resharded = (dry_run.plan(work, (2, 2), reshard_after_forward=reshard) for reshard in (False, True))
    block = 4 * (12 * TINY.n_embd**2 + 13 * TINY.n_embd)
    assert kept.peak_of_kind["blocks, gathered"] == 4 * block
    # The next one is gathered before this one goes.
    assert block <= resharded.peak_of_kind["blocks, gathered"] <= 2 * block
    assert kept.rest == resharded.rest


def test_ranks_do_the_work_of_one_process_and_hold_their_share() -> None:
    result = sharding.compare_steps(config := sharding.ShardingConfig(quick=True), sharding.work_of(config))
    assert result["loss"]["sharded"] == pytest.approx(result["loss"]["alone"], rel=1e-4)  # fp32 or bf16 sums
    assert 1 <= result["rest"]["of_share"] < sharding.REST_LIMIT
    assert 0 < result["checkpoint"]["blocks_s"]["min"] < result["checkpoint"]["on_disk_s"]["min"]


def test_other_work_of_the_ranks_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"losses after the same steps are .*'sharded': 5\.1"):
        sharding.check_same_loss({"alone": 5.0, "sharded": 5.1}, WORK)


def test_under_torchrun_the_step_is_the_sharded_one() -> None:
    config = throughput.ThroughputConfig(quick=True, device="cpu", steps=2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        result = throughput.benchmark_sharded(config, World(0, 1, 0, 1))
    finally:
        dist.destroy_process_group()
    (row,) = result["rows"]
    assert result["mesh"] == {"replicate": 1, "shard": 1, "reshard_after_forward": False}
    line = "the state is 1 replicas x 1 shards, a block's parameters are gathered once"
    assert throughput.table_of(result).endswith(line)
    assert len(row["seconds"]) == 2
    assert row["peak_source"].startswith("the sum over 1 ranks; each: measured")
    assert "1 x 128" in throughput.table_of(result)


def test_a_row_of_several_ranks_is_of_the_whole_job() -> None:
    memory = {"steps": 1, "whole": 2}
    row = throughput.row_of(WORK, [2.0], memory, 3.0, ranks=4)
    (row,) = throughput.with_mfu([row], {WORK.precision: (1e9, "peak of all")})
    assert row["tokens_per_second"] == 4 * WORK.tokens / 2.0
    assert row["mfu"] == row["tokens_per_second"] * perf.flops_per_token(TINY, TINY.block_size) / 1e9


def test_a_picture_of_memory_has_the_logits_of_the_machine_that_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = throughput.row_of(replace(WORK, device="cuda"), [2.0], {"steps": 1, "whole": 2}, 3.0)
    assert there["loss_chunk_tokens"] == loss.GPU_CHUNK_TOKENS
    older = {name: value for name, value in there.items() if name != "loss_chunk_tokens"}
    planned, plan = [], perf.memory_plan

    def memory_plan(model: GPT2Config, *, loss_chunk_tokens: int, **how: Any) -> dict[str, int]:
        planned.append(loss_chunk_tokens)
        return plan(model, loss_chunk_tokens=loss_chunk_tokens, **how)

    monkeypatch.setattr(perf, "memory_plan", memory_plan)
    monkeypatch.setattr(loss, "GPU_CHUNK_TOKENS", 7)
    pictures.svg_of(pictures.draw_memory, {"rows": [there, older]})
    assert planned == [there["loss_chunk_tokens"], 7]


def test_a_peak_measured_in_a_busy_moment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1e9, 4e9, 2e9])
    monkeypatch.setattr(perf, "peak_flops", lambda *_: (next(rates), "measured"))
    monkeypatch.setattr(
        throughput,
        "measure",
        lambda work, _, *, starts: throughput.row_of(work, [2.0], {"steps": 1, "whole": 2}, 3.0),
    )
    config = throughput.ThroughputConfig(
        batch_size=(1, 2), compile=(False,), precision=("float32",), device="cpu"
    )
    result = throughput.benchmark(config)
    assert [row["peak_flops"] for row in result["rows"]] == [4e9, 4e9]
    assert [row["mfu"] for row in result["rows"]] == [row["flops_per_second"] / 4e9 for row in result["rows"]]


def test_only_the_first_row_is_started_cold_and_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def measure(work: Work, config: throughput.ThroughputConfig, *, starts: bool) -> dict[str, str]:
        started.append(starts)
        return {"error": "not measured"}

    monkeypatch.setattr(throughput, "measure", measure)
    for starts in (True, False):
        throughput.benchmark(throughput.ThroughputConfig(batch_size=(1, 2, 4), starts=starts, device="cpu"))
    assert started == [True, False, False] + 3 * [False]


def test_a_cold_start_has_no_cache_and_a_warm_one_that_of_the_cold_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches = []

    class NewWorker(contextlib.nullcontext):
        def __init__(self, contender: str, work: Work, environment: dict[str, str]) -> None:
            super().__init__(self)
            caches.append(
                (set(environment), {*environment.values()}, os.listdir(environment["TRITON_CACHE_DIR"]))
            )
            Path(environment["TORCHINDUCTOR_CACHE_DIR"], "graph").touch()

        def start(self) -> Any:
            return Started(1.0, 2.0, 0)

    monkeypatch.setattr(throughput, "Worker", NewWorker)
    assert throughput.cold_and_warm_s("ours", WORK) == {"cold_s": 3.0, "warm_s": 3.0}
    (names, folders, cold), (_, same_folders, warm) = caches
    assert names == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert folders == same_folders
    assert (len(folders), cold, warm) == (1, [], ["graph"])


def test_a_table_says_what_a_first_step_found() -> None:
    row = throughput.row_of(WORK, [2.0], {"steps": 1, "whole": 2}, 3.0)
    (row,) = throughput.with_mfu([row], {WORK.precision: (1e9, "a peak")})
    lines = throughput.table_of({"rows": [row]}).splitlines()
    assert lines[-1] == "a first step finds whatever compile cache earlier processes have left"
    started = row | {"starts": {"cold_s": 20.0, "warm_s": 8.0}}
    assert "PyTorch's precompiled header" in throughput.table_of({"rows": [started]}).splitlines()[-1]


def test_throughput_has_a_row_for_each_combination() -> None:
    config = throughput.ThroughputConfig(
        batch_size=(1, 2), block_size=(64, 128), compile=(True, False), device="cpu"
    )
    works = throughput.works_of(config)
    assert len({(work.batch_size, work.model.block_size, work.compile) for work in works}) == len(works) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peers.PeersConfig(turns=1), "turns is 1, expected at least 2; set --turns"),
        *(
            (
                functools.partial(config, **{name: 0}),
                f"{name.replace('_', ' ')} is 0, expected at least [12]; set --",
            )
            for config, names in {
                peers.PeersConfig: ("batch_size", "block_size", "accumulation", "steps"),
                limit.LimitConfig: ("batch_size", "block_size", "steps"),
                parts.PartsConfig: ("tokens", "new_tokens", "repeats"),
                data.DataBenchmark: ("file_bytes", "block_size", "batch_size", "total_batch_size", "rounds"),
                prepare.PrepareBenchmark: ("megabytes", "rounds"),
                predict.PredictConfig: ("batch_size",),
                throughput.ThroughputConfig: ("accumulation", "steps"),
            }.items()
            for name in names
        ),
        (
            lambda: predict.PredictConfig(total_batch_size=8192),
            "total batch size is 8192, expected at least 16384; set --total-batch-size",
        ),
        (
            lambda: throughput.ThroughputConfig(batch_size=(4, 0)),
            "batch size is 4 0, expected at least 1; set --batch-size",
        ),
        *(
            (
                functools.partial(config, block_size=size),
                "block size is .*2048, expected at most 1024; set --block-size",
            )
            for config, size in (
                (throughput.ThroughputConfig, (512, 2048)),
                (peers.PeersConfig, 2048),
                (limit.LimitConfig, 2048),
            )
        ),
        (
            lambda: data.DataBenchmark(total_batch_size=100_000),
            r"total batch size is 100,000 tokens, expected a multiple of 65,536 \(64 sequences x 1024 .*\)",
        ),
        (
            lambda: data.DataBenchmark(file_bytes=1_000_001),
            "file bytes is 1,000,001, expected 2 for each token; set --file-bytes",
        ),
        (
            lambda: parts.PartsConfig(quick=True, new_tokens=122),
            "new tokens is 122, expected at most 121, which fit .* after a prompt of 8; set --new-tokens",
        ),
        (
            lambda: prepare.PrepareBenchmark(workers=()),
            "workers is not given, expected at least 1; set --workers",
        ),
        *(
            (
                functools.partial(config, **{name: ()}),
                f"{name} is not given, expected at least one value; set --{name}",
            )
            for config, names in {
                throughput.ThroughputConfig: ("model", "precision", "attention", "compile"),
                peers.PeersConfig: ("contenders",),
                report.ReportConfig: ("only",),
            }.items()
            for name in names
        ),
        (
            lambda: throughput.ThroughputConfig(contender="plain", attention=("auto", "flash")),
            "--attention auto flash with --contender plain, which has its own, expected auto; leave one",
        ),
        (
            lambda: throughput.check_alone(throughput.ThroughputConfig(mesh=throughput.Mesh(shard=2))),
            r"started on one process with --mesh\.\*, which several share; start with torchrun",
        ),
        (
            lambda: report.ReportConfig(arguments=("prepare --source 'a b",)),
            "is not one command .*, expected quotes in pairs; set --arguments",
        ),
        (
            lambda: peers.PeersConfig(contenders=("plain",)),
            "contenders are plain, expected ours among them; set --contenders",
        ),
        (
            lambda: throughput.check_sharded(throughput.ThroughputConfig(contender="plain")),
            "several processes with --contender or --starts, which are measured by one; leave them out",
        ),
        (
            lambda: sharding.ShardingConfig(shard=1),
            "1 copies x 1 shards with 2 sequences each, expected at least 2 processes",
        ),
        (lambda: sharding.ShardingConfig(saves=1), "10 turns and 1 saves, expected at least 2; set --turns"),
        (lambda: sharding.ShardingConfig(check=True), "--check without --dry-run, expected both or none"),
        *(
            (start, "no package litgpt_of_nobody .* contender litgpt; install it .*, or leave litgpt out")
            for start in (
                lambda: peers.compare(peers.PeersConfig(contenders=("ours", "litgpt"), quick=True)),
                lambda: limit.benchmark(limit.LimitConfig(contender="litgpt", quick=True)),
                lambda: throughput.benchmark(throughput.ThroughputConfig(contender="litgpt", quick=True)),
            )
        ),
        (lambda: choose_device("cuda"), "no device cuda on this machine; set --device cpu"),
        (
            lambda: choose_device("cuda:1"),
            "device is 'cuda:1', expected cpu or cuda; set --device, and CUDA_VISIBLE_DEVICES to the number",
        ),
        (lambda: choose_device("gpu"), "device is 'gpu', expected cpu or cuda"),
        (
            lambda: report.ReportConfig(render=Path("a.json"), out=Path("b"), only=("data",)),
            "--render with --only, --out, expected it alone, since it writes .*; leave the others out, or ",
        ),
        (
            lambda: throughput.ThroughputConfig(starts=True, compile=(False, True)),
            "--starts with an eager first row, .* expected a compiled one; set --compile True, or leave ",
        ),
        (
            lambda: report.ReportConfig(only=("all",)),
            "no benchmark is called 'all', expected some of throughput",
        ),
        (
            lambda: report.ReportConfig(arguments=("peer --turns 6",)),
            "no benchmark is called 'peer', expected some of .*; set --arguments",
        ),
    ],
)
def test_a_mistake_is_one_sentence(make, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.PACKAGES, "litgpt", "litgpt_of_nobody")
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (data, "--rounds 0", "rounds is 0, expected at least 1; set --rounds"),
        (limit, "--steps 0", "steps is 0, expected at least 1; set --steps"),
        (parts, "--repeats 1", "repeats is 1, expected at least 2; set --repeats"),
        (peers, "--turns 1", "turns is 1, expected at least 2; set --turns"),
        (predict, "--batch-size 0", "batch size is 0, expected at least 1; set --batch-size"),
        (prepare, "--workers 1 0", "workers is 1 0, expected at least 1; set --workers"),
        (report, "--only", "only is not given, expected at least one value; set --only"),
        (sharding, "--saves 1", "10 turns and 1 saves, expected at least 2; set --turns and --saves"),
        (throughput, "--model", "model is not given, expected at least one value; set --model"),
    ],
)
def test_a_mistake_of_flags_is_one_line_on_a_terminal(
    program: ModuleType,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"content": "a"}', "KeyError: 'text'"),
        ("a.jsonl", '["a"]', "TypeError: list indices"),
        ("a.jsonl", '{"text": 5}', "TypeError: sequence item 0: expected str"),
        ("a.jsonl", "a", "JSONDecodeError: Expecting value"),
        ("a.xz", "plain", "LZMAError: Input format not supported"),
        ("a.jsonl", None, "FileNotFoundError: "),
    ],
)
def test_a_corpus_of_something_else_is_refused(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} cannot be read as JSON lines with a text \({message}"):
        prepare.source_texts(tmp_path / name)


@pytest.mark.parametrize("content", ["", '{"text": ""}'])
def test_a_corpus_without_a_character_is_not_repeated_for_ever(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="has no text, expected at least one character; set another --source"):
        prepare.source_texts(tmp_path / "a.jsonl")


def test_a_quick_run_is_of_the_file_that_it_is_given() -> None:
    path = Path("mine")
    assert data.DataBenchmark(path=path, quick=True, block_size=64).small == data.DataBenchmark(
        path=path,
        quick=True,
        block_size=64,
        file_bytes=8 << 20,
        batch_size=8,
        total_batch_size=64 * 64,
        rounds=1,
    )
    assert data.DataBenchmark(quick=True, block_size=100).small.spec.sequences == 64
    assert prepare.PrepareBenchmark(source=path).small.source == path


def test_a_command_with_a_blank_can_be_typed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a b" / "gpu.json"
    relative = os.path.relpath(path)
    report.measure(report.ReportConfig(only=("predict",)), H100, path)  # there is nothing to read yet
    typed, read, *_ = capfd.readouterr().err.splitlines()
    assert typed == f"python -m benchmarks.predict --measured '{relative}'"
    assert read.startswith(f"error: {relative} cannot be read as a result")
    monkeypatch.setattr(sys, "argv", ["predict", "--measured", relative])
    assert facts("cpu")["command"].endswith(f"--measured '{relative}'")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Tue Mar 5 22:42:15 UTC 2024",
            "535.161.08",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("something else", None),
        (None, None),
    ],
)
def test_the_driver_is_that_of_the_kernel(text: str | None, version: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_a_report_names_the_driver_and_the_cuda_that_torch_was_built_with() -> None:
    for driver, said in (("580.65.06", "580.65.06"), (None, "unknown")):
        about = facts("cpu") | {"device": "cuda", "driver": driver, "cuda": "13.0"}
        rows = dict(report.hardware_rows({"facts": about}))
        assert rows["device"] == f"cuda, driver {said}, CUDA 13.0"


def test_a_gpu_without_fast_bfloat16_is_not_said_to_train_in_float32() -> None:
    for device, said in (("cpu", "no: everything here is in float32"), ("cuda", "no")):
        about = facts("cpu") | {"device": device, "driver": None, "cuda": "13.0", "bf16_fast": False}
        assert dict(report.hardware_rows({"facts": about}))["fast bfloat16"] == said


def test_a_spread_and_a_table() -> None:
    assert spread([3.0, 1.0, 2.0])._asdict() == dict(median=2.0, min=1.0, max=3.0, low=1.5, high=2.5, count=3)
    assert table(["a", "bb"], [["x", "1"], ["yy", "22"]]) == "a   bb\n--  --\nx    1\nyy  22"
    assert table(["a", "bb"], [["x", "1"], ["yy", "22"]], words=["bb"]) == "a   bb\n--  --\nx   1\nyy  22"
