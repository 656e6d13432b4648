"""Weights in Hugging Face's format: what `transformers` writes is read, and what is written it reads."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from local_hub import Repository, serving
from reference import hugging_face
from torch import Tensor

from nanogpt import tree
from nanogpt.byte_pairs import hugging_face_tokenizer
from nanogpt.checkpoint import CHECKPOINTS, Checkpointer, load_params
from nanogpt.errors import UserError
from nanogpt.hf import Export, Import, load_pretrained, save_pretrained
from nanogpt.model import GPT2Config, Params, apply, init
from nanogpt.tokenizer import characters, gpt2

TINY = GPT2Config(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=16)
TINY_WORDS = dataclasses.replace(TINY, vocab_size=50257)
TOKENS = torch.arange(16)[None] * 4 % 65
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def params_of(config: GPT2Config) -> Params:
    generator = torch.Generator().manual_seed(0)
    return tree.map(
        lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), init(config, generator)
    )


def theirs(folder: Path) -> torch.nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def pretrained(folder: Path, **settings: Any) -> Params:
    """A folder that `transformers` has written; the parameters in it."""
    params = params_of(TINY)
    hugging_face(TINY, params).save_pretrained(folder, **settings)
    return params


def same_bits(got: Params, expected: Params) -> bool:
    return got.keys() == expected.keys() and all(got[name].equal(leaf) for name, leaf in expected.items())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    """Puts the tensors in the place of those of these names, which None leaves out."""
    path = folder / "model.safetensors"
    leaves = {name: leaf.clone() for name, leaf in safetensors.torch.load_file(path).items()} | changes
    safetensors.torch.save_file({name: leaf for name, leaf in leaves.items() if leaf is not None}, path)


def test_transformers_reads_what_is_written(tmp_path: Path):
    params = params_of(TINY)
    save_pretrained(tmp_path, params, TINY)
    model = theirs(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(logits_of(model), apply(params, TOKENS, TINY), rtol=1e-5, atol=1e-5)  # fp32


def test_transformers_reads_the_tokenizer_that_is_written(tmp_path: Path):
    import transformers

    save_pretrained(tmp_path, params_of(TINY_WORDS), TINY_WORDS, gpt2())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "It's  a café:\n\n  1,000 \u732b \U0001f600's\t"
    assert tokenizer.encode(text) == gpt2().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (50256, 16)
    assert theirs(tmp_path).config.eos_token_id == 50256
    assert (tmp_path / "tokenizer.json").read_bytes().isascii()  # so that no locale changes it


def test_what_transformers_writes_is_read_bit_for_bit(tmp_path: Path):
    expected = pretrained(tmp_path)
    params, config = load_pretrained(tmp_path)
    assert config == TINY
    assert same_bits(params, expected)


def test_weights_in_several_files_are_read(tmp_path: Path):
    expected = pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same_bits(load_pretrained(tmp_path)[0], expected)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"wte.weight": 1}}])
def test_an_index_without_files_is_a_sentence(index: dict[str, Any], tmp_path: Path):
    pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json has no weight_map, expected the file of each leaf by"):
        load_pretrained(tmp_path)


def test_narrow_weights_are_widened(tmp_path: Path):
    expected = pretrained(tmp_path)
    change_weights(
        tmp_path,
        **{f"transformer.{name}": leaf.half() for name, leaf in expected.items()},
    )
    params, _ = load_pretrained(tmp_path)
    assert same_bits(params, {name: leaf.half().float() for name, leaf in expected.items()})


def test_weights_as_openai_s_model_on_the_hub_has_them_are_read(tmp_path: Path):
    """Without a prefix, with masks, and a config that lacks what was added to it later."""
    params = params_of(TINY)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    masks["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(params | masks, tmp_path / "model.safetensors")
    sizes = {"n_ctx": 16, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 65}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    assert same_bits(load_pretrained(tmp_path)[0], params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), r"has model_type 'llama', expected 'gpt2': no other model than GPT-2"),
        (dict(activation_function="relu"), r"has activation_function 'relu', expected 'gelu_new'"),
        (dict(layer_norm_epsilon=1e-6), r"has layer_norm_epsilon 1e-06, expected 1e-05"),
        (dict(n_inner=32), r"has n_inner 32, expected None"),
        (dict(scale_attn_weights=False), r"has scale_attn_weights False, expected True"),
        (dict(n_head="two"), r"has the sizes .*'n_head': 'two'.*, expected whole numbers from 1 on, and n"),
        (dict(n_embd=None), r"has the sizes .*'n_embd': None.*, expected whole numbers"),
        (dict(n_layer=0), r"config.json has the sizes .*'n_layer': 0.*, expected whole numbers"),
        (dict(n_head=3), r"config.json has the sizes .*'n_head': 3.*, and n_embd a multiple of n_head$"),
        (
            dict(n_layer=3),
            r"holds another model than its config.json says: h.2.ln_1.weight is missing \(12",
        ),
        (
            dict(n_embd=32),
            r"says: wte.weight is float32\[65, 16\], expected float32\[65, 32\] \(28 of 28",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_an_inner_width_that_is_said_is_read(tmp_path: Path):
    pretrained(tmp_path)
    change_config(tmp_path, n_inner=64)
    assert load_pretrained(tmp_path)[1] == TINY


def test_a_head_of_its_own_is_refused_and_a_copy_is_not(tmp_path: Path):
    expected = pretrained(tmp_path)
    change_weights(tmp_path, **{"lm_head.weight": expected["wte.weight"].clone()})
    assert same_bits(load_pretrained(tmp_path)[0], expected)
    change_weights(tmp_path, **{"lm_head.weight": expected["wte.weight"] + 1})
    with pytest.raises(UserError, match=r"has a head of its own, expected lm_head.weight to be the token"):
        load_pretrained(tmp_path)


def test_a_head_for_another_purpose_is_refused(tmp_path: Path):
    pretrained(tmp_path)
    change_weights(tmp_path, **{"score.weight": torch.zeros(2, 16)})
    with pytest.raises(
        UserError, match=r"score.weight is not expected \(1 .*; expected both from .* of a GPT2LMHeadModel$"
    ):
        load_pretrained(tmp_path)


def test_a_leaf_that_is_there_twice_is_refused(tmp_path: Path):
    expected = pretrained(tmp_path)
    change_weights(tmp_path, **{"wte.weight": expected["wte.weight"] + 1})
    with pytest.raises(UserError, match=r"holds wte.weight twice, with and without 'transformer.' or in two"):
        load_pretrained(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"^cannot read .*model.safetensors \(.*; expected what save_pretr"):
        load_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"^cannot read .*model.safetensors \(.*pytorch_model.bin could run"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json holds a list, expected an object of JSON$"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"^cannot read .*config.json \(.*; expected what save_pretrained"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_f.bias": None}, r"^the parameters are not those of the config: ln_f.bias is missing \(1 of 28"),
        (
            {"lm_head.weight": torch.zeros(65, 16)},
            r"lm_head.weight is not expected \(1 of 29 leaves differ\);",
        ),
        ({"wpe.weight": torch.zeros(8, 16)}, r"wpe.weight is float32\[8, 16\], expected float32\[16, 16\]"),
    ],
)
def test_parameters_of_another_model_are_not_written(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
):
    changed = {name: leaf for name, leaf in (params_of(TINY) | changes).items() if leaf is not None}
    with pytest.raises(UserError, match=message):
        save_pretrained(tmp_path / "out", changed, TINY)
    assert not (tmp_path / "out").exists()


def test_narrow_parameters_are_written_as_the_config_says(tmp_path: Path):
    narrow = tree.map(Tensor.bfloat16, params_of(TINY))
    save_pretrained(tmp_path, narrow, TINY)
    leaves = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {leaf.dtype for leaf in leaves.values()} == {torch.float32}
    assert same_bits(load_pretrained(tmp_path)[0], tree.map(Tensor.float, narrow))


def test_a_folder_with_files_is_not_written_to(tmp_path: Path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match=r"is not empty, expected a new folder; choose another --out$"):
        save_pretrained(tmp_path, params_of(TINY), TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"^cannot write to .*mine \(.*; choose another --out or make room$"):
        save_pretrained(tmp_path / "mine", params_of(TINY), TINY)


def test_an_export_that_had_no_room_can_be_repeated(tmp_path: Path):
    config = dataclasses.replace(TINY_WORDS, n_embd=8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_800_000, limits[1]))  # enough for weights, not for tokenizer
    try:
        with pytest.raises(UserError, match=r"^cannot write to .* \(.*; choose another --out or make room$"):
            save_pretrained(tmp_path, params_of(config), config, gpt2())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save_pretrained(tmp_path, params_of(config), config, gpt2())
    assert same_bits(load_pretrained(tmp_path)[0], params_of(config))


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path):
    save_pretrained(tmp_path / "out", params_of(TINY_WORDS), TINY_WORDS, gpt2())
    (tmp_path / "like_this").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "like_this", *(tmp_path / "out").iterdir()]}
    assert len(modes) == 1


def test_a_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    params = params_of(TINY)
    about = {"config": {"model": dataclasses.asdict(TINY)}, "tokenizer": characters("abc").describe()}
    checkpointer = Checkpointer(tmp_path / "run" / CHECKPOINTS)
    checkpointer.save(3, {"params": params, "opt_state": torch.zeros(2)}, metadata=about)
    checkpointer.close()
    Export(run_dir=tmp_path / "run", out=tmp_path / "out")()
    assert same_bits(load_pretrained(tmp_path / "out")[0], params)
    assert capsys.readouterr().out.endswith("; it has no tokenizer, since this is not GPT-2's\n")
    with pytest.raises(UserError, match=r"out is not empty, expected a new folder"):
        Export(run_dir=tmp_path / "nowhere", out=tmp_path / "out")()  # before anything is read


def test_an_import_is_a_run_directory_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_pretrained(tmp_path / "theirs", params_of(TINY_WORDS), TINY_WORDS, gpt2())
    run_dir = tmp_path / "run"
    Import(source=str(tmp_path / "theirs"), run_dir=run_dir)()
    params, about = load_params(run_dir / CHECKPOINTS)
    assert same_bits(params, params_of(TINY_WORDS))
    assert GPT2Config(**about["config"]["model"]) == TINY_WORDS
    assert about["tokenizer"] == gpt2().describe()
    assert f"--init.run-dir {run_dir}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a run, expected a new directory; choose another --run-dir$"):
        Import(source=str(tmp_path / "nowhere"), run_dir=run_dir)()


def test_a_run_directory_that_cannot_be_is_refused_before_the_source_is_read(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^checkpoints cannot be saved to .*file/checkpoints: .*file is not"):
        Import(source=str(tmp_path / "nowhere"), run_dir=tmp_path / "file")()


def test_a_revision_of_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"is a folder, which has no revisions; leave out --revision$"):
        Import(source=str(tmp_path), run_dir=tmp_path / "run", revision="main")()


@pytest.mark.parametrize(
    ("name", "content", "is_known"),
    [
        ("tokenizer.json", hugging_face_tokenizer(), True),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "\u0120the": 1}}}, False),
        ("tokenizer.json", {"model": {"vocab": [["a", -1.5]]}}, False),
        ("vocab.json", hugging_face_tokenizer()["model"]["vocab"] | {"<|endoftext|>": 50256}, True),
        ("vocab.json", {"a": 0, "\u0120the": 1}, False),
    ],
)
def test_another_tokenizer_is_not_taken_for_gpt_2_s(
    name: str, content: dict[str, Any], is_known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_pretrained(tmp_path / "theirs", params_of(TINY_WORDS), TINY_WORDS)
    (tmp_path / "theirs" / name).write_text(json.dumps(content))
    Import(source=str(tmp_path / "theirs"), run_dir=tmp_path / "run")()
    _, about = load_params(tmp_path / "run" / CHECKPOINTS)
    assert about["tokenizer"] == (gpt2().describe() if is_known else None)
    assert ("python -m nanogpt.sample" in capsys.readouterr().out) == is_known


def test_a_model_of_the_hub_is_imported_and_one_that_is_not_there_is_a_sentence(tmp_path: Path):
    pretrained(tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    files["pytorch_model.bin"] = b"not to be fetched"

    def hf(source: str, run_dir: str = "run") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nanogpt.hf", "import", source, "--run-dir", str(tmp_path / run_dir)]
        return subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False
        )

    with serving(Repository("models", "openai-community/gpt2", COMMIT, files), cache=tmp_path) as settings:
        missing, found = hf("nobody/nothing"), hf("gpt2")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: there is no folder nobody/nothing, and you can read no model ")
    assert found.returncode == 0, found.stderr
    params, about = load_params(tmp_path / "run" / CHECKPOINTS)
    assert same_bits(params, params_of(TINY))
    assert about["imported"].endswith(f"models--openai-community--gpt2/snapshots/{COMMIT}")
    assert about["tokenizer"] is None
    assert not list(tmp_path.rglob("pytorch_model.bin"))
    gone = hf("owner/name", "another")  # the server has ended
    assert (gone.returncode, gone.stdout) == (2, "")
    assert gone.stderr.startswith("error: there is no folder owner/name, and the hub does not answer for own")
    assert not (tmp_path / "another").exists()
