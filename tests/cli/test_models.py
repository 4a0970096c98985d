from __future__ import annotations

import json

from expertmix.bindings.families import TESTED, UNSUPPORTED


def test_families_are_listed(expertmix):
    """Those that pass, and those that are refused with the reason."""
    answer = expertmix("models")
    assert answer.code == 0
    assert all(name in answer.out for name in ("olmoe", "mixtral", *UNSUPPORTED))
    known = json.loads(expertmix("models", "--json").out)
    assert known == {"tested": list(TESTED), "refused": UNSUPPORTED}


def test_a_model_shows_its_sites(expertmix, moe):
    """Names, experts, and how many are called."""
    answer = expertmix("models", moe)
    assert (answer.code, answer.err) == (0, "")
    assert "MixtralForCausalLM: 4 sites, context 128 tokens" in answer.out
    found = json.loads(expertmix("models", moe, "--json").out)
    assert found["sites"][2] == {
        "site": "model.layers.2.mlp#0", "experts": 9, "top_k": 2,
        "names": [
            "base", "maths", "backward", "python", "medicine", "shakespeare", "science", "reading",
            "encyclopedia",
        ],
    }  # fmt: skip


def test_a_dense_model_is_told(expertmix, dense):
    """With what to do."""
    answer = expertmix("models", dense)
    assert answer.code == 2
    assert "expertmix convert" in answer.err
