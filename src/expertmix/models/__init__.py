"""Models: the embedded default LM and its experts, LoRA libraries, upcycling them to a MoE,
and a MoE to a Chain-of-Experts and back.

Import the files themselves (`expertmix.models.default`, `.library`, `.upcycle`,
`.chain_conversion`): they import torch and transformers, and this page does not.
"""
