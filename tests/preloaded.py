"""What ranks of tests have before they begin: the server that they are forked from imports this (see `harness`).

Imports take a process seconds, and what DeepSpeed's ZeRO-3 does at each of its starts, a search of all objects for
garbage, takes the longer the more there are; frozen ones aren't searched.
"""

from __future__ import annotations

import gc
from importlib import import_module

# Optimizers import the second, checkpoints the third.
for name in ("torch", "torch._dynamo", "torch.distributed.checkpoint"):
    import_module(name)
gc.collect()
gc.freeze()
