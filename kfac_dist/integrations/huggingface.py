"""K-FAC in Hugging Face's `Trainer`, with DDP and with Accelerate's FSDP2 and DeepSpeed plugins.

    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    add_kfac(trainer, config)
    trainer.train()

`Trainer` says how a loss is divided: causal models get `num_items_in_batch`, the labels of the whole step over all
micro-batches (and ranks), others a mean over the micro-batch. The callback reads that, and the labels, where the model
is called, and tells K-FAC before each forward pass.

Under DDP and FSDP2 K-FAC steps before the optimizer, under DeepSpeed inside of the engine's own step. `Trainer`'s
clipping differs: DeepSpeed clips the preconditioned gradient (Accelerate has it clip to a norm of 1, unless its section
says `gradient_clipping: 0.0`), elsewhere `Trainer` clips the plain one before callbacks see it. `update.kl_clip`
makes both unnecessary: set `max_grad_norm=0` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kfac_dist.config.schema import KFACConfig, LossTerms
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.hooks import HookHandle, before_forward
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.preconditioner.state_file import load_kfac, save_kfac

FILE = "kfac.pt"
IGNORED = -100


def add_kfac(trainer: Trainer, config: KFACConfig | Mapping[str, Any] | None = None) -> KFACCallback:
    """Have a trainer's gradients preconditioned.

    Args:
        trainer: The trainer, before `train`.
        config: As for `KFAC`. For language models: `curvature.loss_terms: token`.

    Returns:
        The callback, which has been added to the trainer.
    """
    callback = KFACCallback(trainer, config)
    trainer.add_callback(callback)
    return callback


class KFACCallback(TrainerCallback):
    """Builds `KFAC` once the model is wrapped, steps it, and saves it with the trainer's checkpoints.

    Args:
        trainer: The trainer that it is added to.
        config: As for `KFAC`.

    Attributes:
        kfac: The preconditioner while there is training.
    """

    def __init__(self, trainer: Trainer, config: KFACConfig | Mapping[str, Any] | None = None) -> None:
        self.kfac: KFAC | None = None
        self._trainer = trainer
        self._config = parse_kfac(config)
        self._hook: HookHandle | None = None
        self._micro_batch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach K-FAC to the wrapped model; load its state if training resumes from a checkpoint."""
        trainer = self._trainer
        wrapped = trainer.model_wrapped
        optimizer = None if self._deepspeed else getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self.kfac = KFAC(
            wrapped,
            self._config,
            optimizer=optimizer,
            grad_scaler=trainer.accelerator.scaler,
            total_steps=state.max_steps,
        )
        file = _folder(args, state) / FILE
        if state.global_step and file.exists():
            load_kfac(self.kfac, file)
        # Prepended: K-FAC's own hooks must know of the micro-batch already.
        self._hook = before_forward(wrapped, self._describe, prepend=True, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Precondition the gradients, unless DeepSpeed has done so in its step."""
        self._micro_batch = 0
        if self.kfac is None or self._deepspeed:
            return
        if self._trainer.accelerator.scaler is not None and not args.max_grad_norm:
            self._trainer.accelerator.unscale_gradients()  # clipping would have done it
        self.kfac.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save K-FAC's state beside the trainer's new checkpoint; collective."""
        if self.kfac is not None:
            save_kfac(self.kfac, _folder(args, state) / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take K-FAC off the model."""
        if self._hook is not None:
            self._hook.remove()
        if self.kfac is not None:
            self.kfac.remove()
        self.kfac = self._hook = None

    @property
    def _deepspeed(self) -> Any:
        return self._trainer.deepspeed if self._trainer.is_deepspeed_enabled else None

    def _describe(self, model: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Tell K-FAC how the loss of the micro-batch is divided whose forward pass begins."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if self.kfac is None or not model.training or not isinstance(labels, Tensor):
            return
        trainer, ranks = self._trainer, self._trainer.args.world_size
        if self._config.curvature.loss_terms is LossTerms.TOKEN:
            shifts = "shift_labels" not in inputs and _shifts_labels(trainer)
            terms: float | Tensor = (labels[..., 1:] if shifts else labels).ne(IGNORED).sum()
        else:
            terms = float(len(labels))
        items = inputs.get("num_items_in_batch")
        if items is None:
            divisor = terms * trainer.current_gradient_accumulation_steps
        else:
            divisor = items / ranks if trainer.args.average_tokens_across_devices else items
        if self._deepspeed is not None:
            # K-FAC takes DeepSpeed to divide by the accumulation steps, which Trainer has asked it not to do.
            divisor = divisor / self._deepspeed.gradient_accumulation_steps()
        last = bool(trainer.accelerator.sync_gradients)
        self.kfac.micro_batch(
            first_sample=(self._micro_batch * ranks + trainer.args.process_index) * len(labels),
            divisor=divisor,
            terms=terms,
            last=last,
        )
        self._micro_batch = 0 if last else self._micro_batch + 1


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _shifts_labels(trainer: Trainer) -> bool:
    """Whether the model's loss compares each position with the next label."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return str(getattr(model, "loss_type", None) or type(model).__name__).startswith(("ForCausalLM", "GPT2LMHead"))
