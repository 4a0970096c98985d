"""Words that stand for models and settings.

Imports nothing heavy, so that the command line may know them.
"""

from __future__ import annotations

from typing import Literal

DEFAULT = "default"
"""The dense LM that expertmix brings along."""

DEFAULT_MOE = "default-moe"
"""The MoE that `convert` makes of it and of the shipped experts."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Type of a model's weights; `auto` is what they are stored in."""
