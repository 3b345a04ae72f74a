"""What every process of the zoo would import, and the server that they are forked from imports once."""

import torch._decomp.decompositions_for_jvp
import torch._dynamo
import torch.distributed
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

import benchmarks.zoo_family

__all__ = ["benchmarks", "torch", "transformers"]
