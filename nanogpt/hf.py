"""GPT-2 in Hugging Face's format, in and out: the same leaves under the same names.

    python -m nanogpt.hf import gpt2 --run-dir runs/openai
    python -m nanogpt.hf export --run-dir runs/gpt2_124m --out exported/gpt2_124m

`import` makes a run directory with one checkpoint, of step 0: `nanogpt.sample` writes text from it, and
`experiments.finetune --init.run-dir` continues from it. `export` makes a folder that `from_pretrained` of
`transformers.GPT2LMHeadModel` reads. Only safetensors are read and written, so no file can run code.
"""

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx2
import torch
import tyro
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import nanogpt
from nanogpt import command, tree
from nanogpt.byte_pairs import hugging_face_tokenizer
from nanogpt.checkpoint import CHECKPOINTS, Checkpointer, load_params
from nanogpt.errors import UserError
from nanogpt.model import PUBLISHED_SIZES, GPT2Config, Params
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer, gpt2, tokenizer_from

CONFIG, TOKENIZER, VOCABULARY = "config.json", "tokenizer.json", "vocab.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TRUNK, EMBEDDING, HEAD = "transformer.", "wte.weight", "lm_head.weight"
MASKS = (".attn.bias", ".attn.masked_bias")
"""Constants that older files hold in addition to the parameters."""
SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
"""Our name for each of their sizes; a size that their config omits is 124M's, for them as for us."""
GPT2_AS_PUBLISHED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""The values we support of settings that only their config has; a setting it omits has the first one."""


def load_pretrained(folder: Path) -> tuple[Params, GPT2Config]:
    """Parameters (float32, on the CPU) and config of a folder that `save_pretrained` wrote, ours or theirs.

    Raises UserError unless it holds a GPT-2 as OpenAI published it, in files that fit each other.
    """
    config = config_from(read_json(folder / CONFIG), folder)
    params = {}
    for name, leaf in (pair for file in weight_files(folder) for pair in read_leaves(file).items()):
        own = name.removeprefix(TRUNK)
        if own in params:
            raise UserError(
                f"{folder} holds {own} twice, with and without {TRUNK!r} or in two files; expected each leaf "
                "once, as save_pretrained writes it"
            )
        if not own.endswith(MASKS):
            params[own] = leaf.float() if leaf.is_floating_point() else leaf
    head = params.pop(HEAD, None)
    if difference := difference_from(config, params):
        raise UserError(
            f"{folder} holds another model than its {CONFIG} says: {difference}; expected both from one "
            "save_pretrained of a GPT2LMHeadModel"
        )
    if head is not None and not head.equal(params[EMBEDDING]):
        raise UserError(f"{folder} has a head of its own, expected {HEAD} to be the token embedding")
    return {name: params[name] for name, _ in config.skeleton.named_parameters()}, config


def save_pretrained(
    folder: Path, params: Params, config: GPT2Config, tokenizer: Tokenizer | None = None
) -> None:
    """Writes config, parameters and, if it is GPT-2's, the tokenizer, as `transformers` does.

    Parameters are written as float32. Raises UserError if they are not those of `config`, or if `folder`
    cannot be written or is not empty. Leaves no incomplete file there.
    """
    leaves = {name: leaf.detach().cpu().float().contiguous() for name, leaf in params.items()}
    if difference := difference_from(config, leaves):
        raise UserError(f"the parameters are not those of the config: {difference}; pass both of one model")
    files: dict[str, Any] = {CONFIG: config_for(config, None if tokenizer is None else tokenizer.end_of_text)}
    if tokenizer is not None and tokenizer.name == "gpt2":
        files |= tokenizer_files(tokenizer, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_empty(folder)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            named = {TRUNK + name: leaf for name, leaf in leaves.items()}
            save_file(named, Path(part) / WEIGHTS, metadata={"format": "pt"})
            for name, value in files.items():
                (Path(part) / name).write_text(json.dumps(value, indent=2) + "\n")
            shutil.copymode(Path(part) / CONFIG, Path(part) / WEIGHTS)  # safetensors keeps others out
            for name in (WEIGHTS, *files):
                (Path(part) / name).replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {folder} ({error}); choose another --out or make room") from error


def difference_from(config: GPT2Config, params: Params) -> str | None:
    """The first leaf whose name, shape or dtype is not the model's, and how many there are; None if none."""
    expected = dict(config.skeleton.named_parameters())
    if differences := tree.diff(params, expected):
        return f"{differences[0]} ({len(differences)} of {len({*params, *expected})} leaves differ)"
    return None


def require_empty(folder: Path) -> None:
    """Raises UserError if `folder` has anything in it."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, expected a new folder; choose another --out")


def tokenizer_files(tokenizer: Tokenizer, config: GPT2Config) -> dict[str, Any]:
    """The byte-pair tokenizer as `transformers.AutoTokenizer` reads it: the content of JSON files by name."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"normalized": True, "special": True}
    special = {"id": tokenizer.end_of_text, "content": END_OF_TEXT} | flags
    return {
        TOKENIZER: hugging_face_tokenizer() | {"added_tokens": [special]},
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": config.block_size,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        },
    }


def config_from(about: dict[str, Any], folder: Path) -> GPT2Config:
    """Our config for theirs. Raises UserError if theirs is not a GPT-2 as OpenAI published it."""
    ours = GPT2Config()
    sizes = {own: about.get(name, getattr(ours, own)) for name, own in SIZES.items()}
    are_numbers = all(type(size) is int and size > 0 for size in sizes.values())
    if not are_numbers or sizes["n_embd"] % sizes["n_head"]:
        raise UserError(
            f"{folder / CONFIG} has the sizes {sizes}, expected whole numbers from 1 on, and n_embd a "
            "multiple of n_head"
        )
    published = GPT2_AS_PUBLISHED | {"n_inner": (None, 4 * sizes["n_embd"])}
    for name, values in published.items():
        if (got := about.get(name, values[0])) not in values:
            raise UserError(
                f"{folder / CONFIG} has {name} {got!r}, expected {values[0]!r}: no other model than GPT-2 as "
                "OpenAI published it fits this program"
            )
    return GPT2Config(**sizes)


def config_for(config: GPT2Config, end_of_text: int | None) -> dict[str, Any]:
    """Their config for ours."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: values[0] for name, values in GPT2_AS_PUBLISHED.items()},
        **{name: getattr(config, own) for name, own in SIZES.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def tokenizer_in(folder: Path, config: GPT2Config) -> Tokenizer | None:
    """GPT-2's tokenizer if the model has room for it and the folder has no other; else None."""
    if config.vocab_size < gpt2().vocab_size:
        return None
    if (folder / TOKENIZER).exists():
        model = read_json(folder / TOKENIZER).get("model")
        ids = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / VOCABULARY).exists():
        ids = read_json(folder / VOCABULARY)
    else:
        return gpt2()
    expected = hugging_face_tokenizer()["model"]["vocab"]
    return gpt2() if isinstance(ids, dict) and expected.items() <= ids.items() else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        value = json.loads(path.read_bytes())  # UTF-8, whatever the locale says
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); expected what save_pretrained writes") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object of JSON")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's parameters: one, or those that an index lists."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    file_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise UserError(f"{folder / INDEX} has no weight_map, expected the file of each leaf by name")
    return [folder / name for name in sorted(set(file_of.values()))]


def read_leaves(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError if there is none or it is damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {file} ({error}); expected what save_pretrained writes (a pytorch_model.bin could "
            "run code, and is not read)"
        ) from error


def download(name: str, revision: str | None) -> Path:
    """A model of the hub, downloaded to a folder of its cache named by the commit; `gpt2` etc. are OpenAI's.

    Raises UserError if there is none that the user can read, or the hub does not answer.
    """
    repository = f"openai-community/{name}" if name in PUBLISHED_SIZES else name
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[CONFIG, TOKENIZER, VOCABULARY, INDEX, "*.safetensors"],
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"there is no folder {name}, and you can read no model {repository!r} at revision "
            f"{revision or 'main'!r} of the hub; check the spelling and --revision, or log in with "
            "`hf auth login`"
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"there is no folder {name}, and the hub does not answer for {repository} ({first_line}); check "
            "the name and the network"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory from a GPT-2 in Hugging Face's format."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Folder with config.json and model.safetensors, or a model of the hub, as owner/name; gpt2, gpt2-medium,
    gpt2-large and gpt2-xl are OpenAI's."""
    run_dir: Path
    """New run directory to make."""
    revision: str | None = None
    """Commit, branch or tag on the hub; None is the newest commit."""

    def __call__(self) -> None:
        """Saves the parameters as a checkpoint of step 0."""
        checkpointer = Checkpointer(self.run_dir / CHECKPOINTS)
        if checkpointer.latest() is not None or (self.run_dir / CONFIG).exists():
            raise UserError(f"{self.run_dir} holds a run, expected a new directory; choose another --run-dir")
        checkpointer.check({})  # before gigabytes are fetched for it
        folder = Path(self.source)
        if folder.is_dir() and self.revision is not None:
            raise UserError(f"{folder} is a folder, which has no revisions; leave out --revision")
        folder = folder if folder.is_dir() else download(self.source, self.revision)
        params, config = load_pretrained(folder)
        tokenizer = tokenizer_in(folder, config)
        about = {
            "config": {"model": dataclasses.asdict(config)},
            "imported": str(folder.absolute()),
            "tokenizer": None if tokenizer is None else tokenizer.describe(),
            "versions": {"nanogpt": nanogpt.__version__, "torch": torch.__version__},
            "command": sys.argv,
        }
        with contextlib.closing(checkpointer):
            checkpointer.save(0, {"params": params}, metadata=about)
        where = shlex.quote(str(self.run_dir))
        without, write = " without a tokenizer, since theirs is not GPT-2's", ""
        if tokenizer is not None:
            without, write = "", f"write text with python -m nanogpt.sample --run-dir {where}, or "
        print(
            f"{sum(map(torch.numel, params.values())):,} parameters of {self.source} are in {self.run_dir}"
            f"{without}; {write}go on with python -m experiments.finetune --init.run-dir {where}"
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the newest checkpoint of a run in Hugging Face's format."""

    run_dir: Path = Path("runs/gpt2_124m")
    """Run directory with a checkpoint."""
    out: Path
    """Folder to make: config.json, model.safetensors and, for GPT-2's byte pairs, the tokenizer."""

    def __call__(self) -> None:
        """Writes the folder."""
        require_empty(self.out)  # before gigabytes are read for it
        params, about = load_params(self.run_dir / CHECKPOINTS)
        tokenizer = tokenizer_from(about["tokenizer"]) if about["tokenizer"] else None
        save_pretrained(self.out, params, GPT2Config(**about["config"]["model"]), tokenizer)
        rest = "" if (self.out / TOKENIZER).exists() else "; it has no tokenizer, since this is not GPT-2's"
        print(f"{self.out} is a model for transformers.GPT2LMHeadModel.from_pretrained{rest}")


@dataclass(frozen=True, kw_only=True)
class HfCommand:
    """What the first word of the command line chooses."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[Import, tyro.conf.subcommand("import")] | Annotated[Export, tyro.conf.subcommand("export")]
    ]


if __name__ == "__main__":
    with command.mistakes_in_a_sentence():
        command.parse(HfCommand).command()
