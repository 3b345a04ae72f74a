"""Necessary flops and bytes of K-FAC's phases, over the rates of the machine at hand.

For a block with factors of a and g rows, M rows a measurement, fp32 (4 bytes a value) but for the rows, which autocast
makes bfloat16 (2 bytes), a phase has to

    statistics        (a² + g²)·M flops; read the rows M·(a + g), write a² + g²
    averaging         read the average and the new sums, write the average: 3·(a² + g²)
    inversion         n³ flops; read the factor, write the inverse: 2·n²
    preconditioning   2·a·g·(a + g) flops; read both inverses, read and write the gradient: a² + g² + 2·a·g

and takes no less than the larger of its flops over the rate of a matrix product and its bytes over the rate of a copy,
both measured in the same process. A fraction is that time over the measured one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.clock import best_seconds
from kfac_dist import KFAC
from kfac_dist.curvature.factors import Side

_FLOAT, _HALF = 4, 2


@dataclass(frozen=True)
class Work:
    """Flops and bytes of one phase of one step."""

    flops: float
    bytes: float

    def seconds(self, flop_rate: float, byte_rate: float) -> float:
        return max(self.flops / flop_rate, self.bytes / byte_rate)


def ceilings(device: torch.device, *, small: bool) -> dict[str, float]:
    """Return flops a second of a large square product by precision, and bytes a second of a copy (read and written)."""
    n = 512 if small else 8192
    rates = {}
    precisions = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False)}
    if device.type == "cuda":
        precisions["tf32"] = (torch.float32, True)
    before = torch.backends.cuda.matmul.allow_tf32
    for name, (dtype, tf32) in precisions.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
        out = torch.empty_like(a)
        rates[f"matmul_{name}_flops"] = (
            2 * n**3 / best_seconds(device, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        )
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.empty(2**22 if small else 2**29, device=device)
    target = torch.empty_like(source)
    rates["copy_bytes"] = 2 * source.nbytes / best_seconds(device, lambda: target.copy_(source))
    return rates


def rows_of(kfac: KFAC, model: nn.Module, inputs: torch.Tensor) -> dict[tuple[str, Side], float]:
    """Return M by block and side, counted in a forward pass; blocks without two factors have none."""
    found: dict[tuple[str, Side], float] = {}
    handles = []
    for block in kfac.coverage.blocks:
        if any(factor.side is Side.F for factor in block.factors):
            continue

        def count(module: nn.Module, args: object, output: torch.Tensor, name: str = block.name) -> None:
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            found[name, Side.A] = found[name, Side.G] = output.numel() / output.shape[channels]

        handles.append(block.module.register_forward_hook(count))
    with torch.no_grad(), kfac.unobserved():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def work(kfac: KFAC, rows: Mapping[tuple[str, Side], float]) -> dict[str, Work]:
    """Return the work of one measurement, one refresh of everything and one preconditioning on one rank."""
    flops = dict.fromkeys(("statistics", "averaging", "inversion", "preconditioning"), 0.0)
    values = dict.fromkeys(flops, 0.0)
    for name, block in kfac.monitor.plan.blocks.items():
        for unit in block.units:
            count = rows.get((name, unit.side), 0.0)
            dense = len(unit.shape) == 3
            flops["statistics"] += unit.numel * count if dense else 0.0
            values["statistics"] += unit.numel + count * unit.dim * _HALF / _FLOAT
            values["averaging"] += 3 * unit.numel
            flops["inversion"] += unit.cost
            values["inversion"] += 2 * unit.numel
            values["preconditioning"] += unit.numel
        batch, d_out, d_in = block.matrix_shape
        sides = {unit.side for unit in block.units}
        if {Side.A, Side.G} <= sides:
            flops["preconditioning"] += 2 * batch * d_out * d_in * (d_out + d_in)
        values["preconditioning"] += 2 * batch * d_out * d_in
    return {phase: Work(flops[phase], _FLOAT * values[phase]) for phase in flops}
