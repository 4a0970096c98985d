"""Public sets of choice questions by name, read from the hub: `open_items`.

The hub keeps a Parquet copy of every set under one scheme, so no set's own code runs. Sets are used
for what their licences allow; nothing is kept but in the hub's own cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.study.choice import Item
from expertmix.study.choice_files import read_items

_CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True, slots=True)
class PublicSet:
    """Where a set is on the hub.

    Attributes:
        repo: Its id.
        config: Its configuration.
        split: Its split with answers that is asked by default.
    """

    repo: str
    config: str
    split: str


SETS = {
    "arc_challenge": PublicSet("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": PublicSet("allenai/ai2_arc", "ARC-Easy", "test"),
    "commonsense_qa": PublicSet("tau/commonsense_qa", "default", "validation"),
    "hellaswag": PublicSet("Rowan/hellaswag", "default", "validation"),
    "mmlu": PublicSet("cais/mmlu", "all", "test"),
    "openbook_qa": PublicSet("allenai/openbookqa", "main", "test"),
    "piqa": PublicSet("ybisk/piqa", "plain_text", "validation"),
    "sciq": PublicSet("allenai/sciq", "default", "test"),
    "siqa": PublicSet("allenai/social_i_qa", "default", "validation"),
}


def open_items(source: str | Path, progress: Progress = quiet) -> list[Item]:
    """Items of a file, or of a public set by name: `arc_easy`, or `openbook_qa:train`.

    Raises:
        ConfigError: Neither a file nor a known name, or one that cannot be read or fetched.
    """
    name, _, split = str(source).partition(":")
    if Path(source).is_dir():
        raise ConfigError(f"{source} is a folder: name a file of questions")
    if Path(source).exists() or (name not in SETS and Path(source).suffix):
        return read_items(source)
    if name not in SETS:
        raise ConfigError(
            f"there is no file {source}, and no public set of that name; known: {', '.join(SETS)}, "
            f"each with :train or another split"
        )
    found = SETS[name]
    progress(f"fetching {name}", 0, 0)
    path = _fetched(found, split or found.split, name)
    return read_items(path, f"{name}-{split or found.split}")


def _fetched(found: PublicSet, split: str, name: str) -> str:
    file = f"{found.config}/{split}/0000.parquet"
    try:
        return hf_hub_download(found.repo, file, repo_type="dataset", revision=_CONVERTED)
    except LocalEntryNotFoundError as problem:
        raise ConfigError(
            f"cannot fetch {name} from the hub ({found.repo}): no network, and it is not in the "
            f"hub's cache. Give a file instead."
        ) from problem
    except (HfHubHTTPError, OSError) as problem:
        raise ConfigError(
            f"cannot fetch {name}, split {split}, from the hub ({found.repo}, {file}): {problem}"
        ) from problem
