"""Data sets on the hub, through `datasets`: parquet files at a fixed commit; none of their code is run."""

from dataclasses import dataclass
from typing import Any

import httpx2
from datasets import DownloadConfig, load_dataset_builder
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from datasets.utils.file_utils import cached_path, xopen
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from nanogpt.errors import UserError
from nanogpt.prepare.readers import first_line, hub_unreachable

NETWORK_ERRORS = (OSError, httpx2.HTTPError)


@dataclass(frozen=True)
class HubFiles:
    """Parquet files of one split of a data set, in its order, as `hf://` addresses that name the commit."""

    revision: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each file."""


def find_files(name: str, *, revision: str | None, config: str | None, split: str) -> HubFiles:
    """The files of `name` at `revision`, a commit, tag or branch; None is the newest commit.

    Raises UserError if the hub cannot be reached, if there is no such data set, configuration or split, or if
    it does not consist of parquet files.
    """
    try:
        info = HfApi().dataset_info(name, revision=revision, files_metadata=True)
        builder = load_dataset_builder(name, config, revision=info.sha)
    except (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"you can read no data set {name!r} at revision {revision or 'main'!r} ({first_line(error)}), "
            "expected owner/name; check the spelling and --revision, or log in with `hf auth login`"
        ) from error
    except (DataFilesNotFoundError, ValueError, RuntimeError) as error:
        # no data files; an unknown configuration, or none named though there are several; a loading script
        raise UserError(
            f"cannot use {name} ({first_line(error)}), expected parquet files; set --config or name another"
        ) from error
    except NETWORK_ERRORS as error:
        raise hub_unreachable(name, error) from error
    files = dict(builder.config.data_files or {})
    if split not in files:
        raise UserError(
            f"{name} has the splits {', '.join(files)}, expected {split!r}; set --split to one of them"
        )
    names = tuple(str(file) for file in files[split])
    if not all(file.endswith(".parquet") for file in names):
        raise UserError(
            f"{name} holds files like {names[0]}, expected parquet; download them and name the folder"
        )
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    paths = [file.removeprefix("hf://datasets/").split("/", 2)[-1] for file in names]
    return HubFiles(str(info.sha), names, tuple(sizes.get(path, 0) for path in paths))


def open_file(name: str, cached: bool) -> Any:
    """A file on the hub to read piece by piece, or its path on this machine after a download to the cache."""
    try:
        if cached:
            return cached_path(name, download_config=DownloadConfig(max_retries=5))
        return xopen(name, "rb", download_config=DownloadConfig(max_retries=5))
    except NETWORK_ERRORS as error:
        raise hub_unreachable(name, error) from error
