"""Settings in the words of transformers."""

from __future__ import annotations

import torch
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from expertmix.study.train_plan import TrainPlan
from expertmix.study.train_processes import world_size
from expertmix.study.train_settings import TrainSettings

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def arguments(plan: TrainPlan) -> TrainingArguments:
    """What Trainer is told. When to log, evaluate and save, `train_trainer` says itself."""
    settings = plan.settings
    rows = settings.batch_size // (settings.accumulation * world_size())
    share = settings.warmup
    warmup = round(share * plan.steps) if share < 1 else round(share)
    processor = on_processor(settings)
    return TrainingArguments(
        output_dir=str(settings.out),
        run_name=settings.out.name,
        max_steps=plan.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bf16",
        seed=settings.seed,
        use_cpu=processor,
        dataloader_pin_memory=not processor,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        average_tokens_across_devices=False,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=list(settings.trackers) or "none",
        ddp_find_unused_parameters=False,
    )


def on_processor(settings: TrainSettings) -> bool:
    """Whether no accelerator is used."""
    return settings.device == "cpu" or not torch.accelerator.is_available()


def sharded(settings: TrainSettings) -> DistributedConfig | None:
    """How the weights are shared out over the processes; None where each has all of them."""
    world = world_size()
    if settings.parallel == "ddp":
        return None
    experts = world if settings.parallel == "experts" else 1
    return DistributedConfig(fsdp_size=world, ep_size=experts)
