"""Who is chosen, and how outputs combine: a shelf of LoRA adapters on one base model.

Import the files themselves (`expertmix.experts.composed`, `.shelf`, `.peft_folder`, `.peft_live`):
they import torch, and this page does not.
"""
