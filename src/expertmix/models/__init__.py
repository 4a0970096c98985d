"""Models: the embedded default LM and its experts, LoRA libraries, and upcycling them to a MoE.

Import the files themselves (`expertmix.models.default`, `.library`, `.upcycle`): they import
torch and transformers, and this page does not.
"""
