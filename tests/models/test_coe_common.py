"""transformers' own model tests, on CoE. See docs/papers/coe.md for what runs and what does not."""

from __future__ import annotations

import importlib
import sys
import unittest
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from expertmix.models.coe import CoeConfig, CoeForCausalLM, CoeModel

from .fetch_transformers_tests import WANTED, folder_of_tests

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not written for warnings as errors

if not (folder_of_tests() / WANTED).exists():
    pytest.skip(
        "transformers' own tests are not there: run tests/models/fetch_transformers_tests.py",
        allow_module_level=True,
    )


def _their(name: str) -> Any:
    """A module of theirs; what the sdist leaves out is an empty class."""
    package = "transformers_tests"
    if package not in sys.modules:
        root = ModuleType(package)
        root.__path__ = [str(folder_of_tests())]
        sys.modules[package] = root
        for missing, mixin in (
            ("exporters.test_export", "ExportTesterMixin"),
            ("generation.test_utils", "GenerationTesterMixin"),
        ):
            sys.modules[f"{package}.{missing.split('.')[0]}"] = ModuleType(missing)
            stub = ModuleType(missing)
            setattr(stub, mixin, type(mixin, (), {}))
            sys.modules[f"{package}.{missing}"] = stub
    return importlib.import_module(f"{package}.{name}")


_common = _their("test_modeling_common")


class CoeTester:
    """A tiny CoE and inputs for it, by the names under which their tests ask."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> CoeConfig:
        return CoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            num_experts=8,
            num_experts_per_tok=2,
            num_iterations=2,
            n_shared_experts=1,
            dense_layers=[0],  # so that every entry of the parallel plans has a parameter
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[CoeConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        ids = _common.ids_tensor(shape, self.vocab_size - 3) + 3
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class TestCoeCommon(_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CoeModel, CoeForCausalLM)
    test_all_params_have_gradient = False  # an expert that nobody calls has none

    @pytest.fixture(autouse=True)
    def _known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where their tests look up what kind of model a class is."""
        for mapping, name in (
            (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "CoeForCausalLM"),
            (modeling_auto.MODEL_MAPPING_NAMES, "CoeModel"),
        ):
            monkeypatch.setitem(mapping, "coe", name)

    def setUp(self) -> None:
        self.model_tester = CoeTester(self)

    @unittest.skip("the sdist has no GenerationTesterMixin; test_coe_model.py tests generation")
    def test_generation_tester_mixin_inheritance(self) -> None: ...
