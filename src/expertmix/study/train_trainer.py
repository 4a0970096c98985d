"""The training loop: HF's Trainer with exact checkpoints, routing figures and a stop at NaN.

It knows a model and blocks; no config file and no texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerControl

from expertmix.errors import ModelError, OutputError
from expertmix.study.train_balance import BiasBalance
from expertmix.study.train_blocks import Blocks
from expertmix.study.train_checkpoint import last_good, prune, remove, seal, write_errors
from expertmix.study.train_flow import Flow
from expertmix.study.train_losses import aux_weight, has_router_losses, loss_sums
from expertmix.study.train_metrics import Tell
from expertmix.study.train_rhythm import Rhythm
from expertmix.study.train_routing import RoutingWatch, scalars
from expertmix.study.train_trouble import (
    first_nonfinite,
    first_nonfinite_gradient,
    nonfinite_weights,
)

_Base: Any = Trainer


class ExpertTrainer(_Base):  # type: ignore[misc]
    """A Trainer whose runs are exact to resume and can be watched.

    Every block has as many targets as any other, so the loss of a step is the mean over its
    micro-batches; so are the routers' losses, which thus weigh the same at any accumulation and
    number of processes. Evaluations leave them out.

    Args:
        model: Some of its parameters may be frozen.
        arguments: Of transformers; without strategies of their own.
        rhythm: When what happens.
        training: In the order of the run.
        validation: May be empty.
        tokenizer: Saved with the model.
        bias_rate: See `BiasBalance`.
        tell: Told each line of figures, in the first process.
        moved: Told each step that was made.
    """

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        rhythm: Rhythm,
        training: Blocks,
        validation: Blocks,
        tokenizer: Any,
        *,
        bias_rate: float,
        tell: Tell,
        moved: Callable[[int], None],
    ) -> None:
        self._rhythm = rhythm
        self._tell = tell
        self._tokenizer = tokenizer  # Trainer would write its pad token into the model's config
        self._watch = RoutingWatch(model)
        self._balance = BiasBalance(model, bias_rate)
        self._cached = bool(model.config.use_cache)  # type: ignore[union-attr]
        self._router_losses = self._watch.routed and has_router_losses(model)
        self._aux: Tensor | None = None
        self._flow = Flow(
            rhythm,
            lambda: self._balance.update(self._sum),
            moved,
            validates=len(validation) > 0,
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=training,
            eval_dataset=validation,
            callbacks=[self._flow],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False

    def run(self, checkpoint: Path | None) -> None:
        """Train, from the beginning or from a checkpoint.

        Raises:
            ModelError: The loss or the gradient is not finite; says when and where.
            OutputError: A checkpoint cannot be written.
        """
        with self._watch.attached(), self._balance.attached():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as it is to be used: generating with a cache.

        Raises:
            ModelError: Its weights are not finite.
        """
        broken = nonfinite_weights(self.model)
        if broken is not None:
            raise self._trouble(f"the step before made the weights {broken} infinite or no number")
        config = self.model.config
        config.use_cache = self._cached
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            config.use_cache = False
        if self.args.should_save:
            self._tokenizer.save_pretrained(output_dir)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss, watched where a line is due."""
        learning = model.training
        if self._router_losses:
            inputs = {**inputs, "output_router_logits": learning}
        with ExitStack() as stack:
            if learning:
                stack.enter_context(self._watch.looking(self._rhythm.logs(self._step)))
                stack.enter_context(self._balance.counting())
            outputs = model(**inputs)
        loss = outputs["loss"]
        if learning and self._router_losses and outputs.aux_loss is not None:
            self._keep_aux(outputs.aux_loss.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch.

        Raises:
            ModelError: Its loss is not finite.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if torch.isfinite(loss):
            return loss
        raise self._trouble(f"the loss is {float(loss)}; {self._where(inputs)}")

    def _where(self, inputs: dict[str, Any]) -> str:
        """Which module went wrong: the batch once more, unless all processes are needed for it."""
        if self.is_distributed_loading_by_transformers:
            return "in which module cannot be seen while weights are shared out"
        return first_nonfinite(self.model, lambda: self.model(**self._on(inputs)))

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss per token of the validation blocks, the same for any number of processes."""
        model = self.model_wrapped
        model.eval()
        sums = loss_sums(
            self.eval_dataset,
            self.args.per_device_eval_batch_size,
            (self.args.process_index, self.accelerator.num_processes),
            lambda batch: self.compute_loss(model, self._prepare_inputs(batch)),
        )
        total, count = self._sum(sums.to(self.args.device)).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        handler: Any = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the trackers, one number per name; and a line with all of it."""
        tokens = self.state.global_step * self._rhythm.tokens
        self.state.epoch = tokens / self._rhythm.epoch
        where = {"step": self.state.global_step, "epoch": self.state.epoch, "tokens": tokens}
        if "loss" in logs:
            sites = self._watch.take(self._sum)
            logs = self._training_figures(logs)
            self._say({**where, **logs, "routing": [one.to_dict() for one in sites]})
            logs = {**logs, **scalars(sites)}
        elif "eval_loss" in logs:
            self._say({**where, "eval_loss": logs["eval_loss"]})
        super().log(logs, start_time)

    @property
    def _step(self) -> int:
        """The step that is being made; the first is 1."""
        return int(self.state.global_step) + 1

    def _on(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._prepare_inputs(inputs)
        return {**found, "output_router_logits": True} if self._router_losses else found

    def _training_figures(self, logs: dict[str, float]) -> dict[str, float]:
        """The loss without the routers' losses, which stand beside it; and the speed."""
        steps, seconds = self._flow.lap()
        found = {
            **logs,
            "tokens_per_second": steps * self._rhythm.tokens / max(seconds, 1e-9),
        }
        if self._aux is not None:
            parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
            found["aux_loss"] = float(self._sum(self._aux)) / parts / steps
            found["loss"] -= found["aux_loss"]
        self._aux = None
        return found

    def _keep_aux(self, aux: Tensor) -> None:
        weighted = aux * aux_weight(self.model)
        self._aux = weighted if self._aux is None else self._aux + weighted

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        summed: Tensor = self.accelerator.reduce(values, reduction="sum")
        return summed

    def _say(self, line: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            self._tell(line)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(found)):
            where = first_nonfinite_gradient(self.model)
            raise self._trouble(f"the gradient's norm is {float(found)}, of {where} first")
        return found

    def _trouble(self, what: str) -> ModelError:
        good = last_good(Path(self.args.output_dir))
        kept = "no checkpoint was saved yet" if good.folder is None else f"{good.folder} is good"
        return ModelError(
            f"stopped at step {self._step}: {what}. The step was not made; {kept}. Lower "
            f"learning_rate or clip, or look at the texts"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer does; then sealed, and older ones removed."""
        out = Path(self.args.output_dir)
        folder = out / f"checkpoint-{self.state.global_step}"
        try:
            with write_errors(folder):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(folder)
        except OutputError as problem:
            remove(folder)
            good = last_good(out).folder
            kept = "there is no earlier one" if good is None else f"{good} is whole"
            raise OutputError(
                f"{problem}; {kept}, and the same command goes on from it"
            ) from problem
        if self.args.should_save:
            prune(out, self._rhythm.keep)
