"""What every process of the zoo imports; the server that they are forked from imports it once."""

import torch
import torch.distributed
import transformers
import transformers.modeling_utils
import transformers.models.auto.modeling_auto

import benchmarks.zoo_family

__all__ = ["benchmarks", "torch", "transformers"]
