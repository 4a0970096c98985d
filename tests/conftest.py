"""For all tests: one thread, no hub, and no test that fails because a machine is busy."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from hypothesis import settings

settings.register_profile("expertmix", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("expertmix")
torch.set_num_threads(1)
