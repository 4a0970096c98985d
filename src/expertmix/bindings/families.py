"""What the structural binding cannot see: families that do not fit, and why.

Every other MoE of transformers needs no entry here. docs/models.md lists who was tested.
"""

from __future__ import annotations

UNSUPPORTED: dict[str, str] = {
    "Llama4TextExperts": "scores multiply the input of every expert, so no weights reach the experts",
    "JetMoeParallelExperts": "tokens are sorted by expert before the experts see them",
    "SwitchTransformersExperts": "experts get a one-hot capacity mask instead of expert numbers",
    "NllbMoeExperts": "experts get a capacity mask instead of expert numbers",
    "DogeCDMoE": "experts are rows of two embeddings, picked by product keys",
}
"""Experts class -> reason; a model of such a family raises UnsupportedModelError."""

NO_PROBABILITIES = frozenset({"PhimoeTopKRouter"})
"""Routers whose softmax is taken again for each of the K experts, so that no one table exists."""

BY_TOKEN_ID = frozenset({"DeepseekV4HashRouter"})
"""Routers that look the experts up by token id: scores do not choose."""
