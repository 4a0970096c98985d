"""Adapters on the Hugging Face hub, by id `owner/name`.

Only the files of plain adapters are fetched, never pickles or code. Knows no file format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertmix.errors import CheckpointError

_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")


def is_hub_id(name: str | Path) -> bool:
    """`owner/name`; a path object is never one, nor is the name of a folder that exists."""
    return isinstance(name, str) and bool(_ID.match(name)) and not Path(name).exists()


def fetch(name: str, files: Sequence[str]) -> Path:
    """The folder of a repository in the hub's cache, with those of its files that have such names.

    Files at its top are fetched; where the first of them is not there, those of its folders are.

    Args:
        name: `owner/name`.
        files: Names of files; the first one tells that there is an adapter.

    Raises:
        CheckpointError: There is no such repository, or no network and nothing in the cache.
    """
    folder = _snapshot(name, files)
    if not (folder / files[0]).is_file():
        folder = _snapshot(name, [f"*/{file}" for file in files])
    return folder


def home(snapshot: Path) -> Path:
    """The repository's own folder in the hub's cache, which outlives its revisions."""
    return snapshot.parent.parent  # models--owner--name/snapshots/revision


def _snapshot(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The base class is that of the hub's own client, whichever that is (httpx, or one after it).
    network: Any = HfHubHTTPError.__mro__[1]
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, EntryNotFoundError, network) as problem:
        reason = str(problem).strip().partition(os.linesep)[0].rstrip(".:")
        raise CheckpointError(
            f"{name} is not a folder and cannot be fetched from the hub: {reason}. Give a folder "
            f"of adapters, or the hub id of an adapter with safetensors. (Without network it must "
            f"be in the hub's cache.)"
        ) from problem
