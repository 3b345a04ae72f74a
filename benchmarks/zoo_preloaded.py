"""Imports of every process of the zoo, made once by the server that they are forked from."""

import torch._decomp.decompositions_for_jvp
import torch._dynamo
import torch.distributed
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

import benchmarks.zoo_family

__all__ = ["benchmarks", "torch", "transformers"]
