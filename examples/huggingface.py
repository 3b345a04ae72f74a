"""A tiny GPT-2 on text that ships with Python, by Hugging Face's Trainer and K-FAC; nothing is downloaded.

    torchrun --standalone --nproc-per-node 2 examples/huggingface.py ddp
    torchrun --standalone --nproc-per-node 2 examples/huggingface.py fsdp2
    torchrun --standalone --nproc-per-node 2 examples/huggingface.py zero3

Needs pip install "kfac_dist[hf,deepspeed]".
"""

from __future__ import annotations

import argparse
from pydoc_data import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from kfac_dist.integrations.huggingface import add_kfac

CONTEXT = 64


def text() -> list[dict[str, torch.Tensor]]:
    """Python's help texts, cut into sequences of bytes."""
    data = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return [{"input_ids": part, "labels": part} for part in tokens.split(CONTEXT)[:-1]]


def engine_arguments(engine: str, accumulate: int) -> dict[str, Any]:
    """Arguments of TrainingArguments for each engine."""
    match engine:
        case "fsdp2":
            return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}}
        case "zero1" | "zero2" | "zero3":
            return {
                "deepspeed": {
                    "train_micro_batch_size_per_gpu": "auto",
                    "gradient_accumulation_steps": accumulate,
                    "zero_optimization": {"stage": int(engine[-1])},
                    "zero_allow_untested_optimizer": True,
                    "gradient_clipping": 0.0,  # Accelerate would clip to 1
                }
            }
    return {}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a micro-batch on one rank")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--output", default="runs/huggingface")
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in the output folder")
    parser.add_argument("--no-kfac", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        **engine_arguments(options.engine, options.accumulate),
    )
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=text())
    if not options.no_kfac:
        add_kfac(
            trainer,
            {
                "curvature": {"likelihood": "categorical", "loss_terms": "token", "factor_every": 2},
                "inversion": {"damping": 0.03, "inverse_every": 10, "max_factor_dim": 64},
                "update": {"kl_clip": 0.01, "kl_clip_lr": 0.05},
            },
        )
    trainer.train(resume_from_checkpoint=options.resume or None)


if __name__ == "__main__":
    main()
