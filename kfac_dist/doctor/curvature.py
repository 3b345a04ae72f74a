"""The factors of a micro-batch against the exact Gauss–Newton matrix: equal where they have to be, close elsewhere.

With `type2` gradients K-FAC's block is the GGN's for one sample with one position, and a norm's unit-wise blocks always
are: a difference there is an error. For more samples, or positions that share the weight, A ⊗ G is an approximation,
whose distance is shown; as it is for a weight that is embedding and head at once, whose block is L ⊗ R / tr F.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Fisher, KFACConfig, LossConfig, LossTerms, Sharing
from kfac_dist.curvature.block_tridiagonal_units import find_all
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.blocks.layers.norm import NormBlock
from kfac_dist.curvature.capture.shared_outputs import Samples
from kfac_dist.curvature.factors import FactorKind, Side, Unit
from kfac_dist.curvature.gram import complete
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.doctor.findings import CurvatureRow, Finding, Severity
from kfac_dist.doctor.gauss_newton import ENTRIES, compare, hessian_rows
from kfac_dist.doctor.measure import Still, found_shared, measuring
from kfac_dist.doctor.measure import factors as measured_factors
from kfac_dist.doctor.symmetry import examine_symmetry
from kfac_dist.hooks import after_forward
from kfac_dist.inputs import Inputs, each
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.preconditioner.plan import block_units
from kfac_dist.tasks import Loss
from kfac_dist.training.data.batches import Source
from kfac_dist.training.passes import forward

# Backward passes: one for each output of each term, at most so many.
ROWS = 256
SAMPLES = 8
PARAMETERS = 5_000_000
# fp32 statistics, and on GPUs products in TF32.
TOLERANCE = 5e-3
# A block whose norm is so much smaller than the largest's may hold nothing but rounding, as a query's and a key's does
# where there is only one position to attend to: it is shown, and not judged.
FAINT = 1e-12
# Below this the loss's Hessian at the outputs, computed in fp64, is rounding: the model is as good as certain.
CERTAIN = 1e-12

Micro = tuple[Inputs, Tensor]


def examine_curvature(
    kfac: KFACConfig,
    loss_config: LossConfig,
    module: nn.Module,
    loss: Loss,
    data: Source,
    ranks: Communicator,
    still: Still = nn.Module.eval,
) -> tuple[list[Finding], tuple[CurvatureRow, ...]]:
    """Compare one sample, then as many as `ROWS` backward passes allow; collective, on the same samples everywhere.

    Args:
        kfac: The run's K-FAC.
        loss_config: The loss's name, and which labels don't count.
        module: The bare model.
        loss: The loss.
        data: The training data.
        ranks: The ranks.
        still: Sets the mode in which the model is measured.
    """
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if trained > PARAMETERS:
        text = f"not compared with the exact curvature: {trained:,} values, at most {PARAMETERS:,} are compared"
        return [Finding("curvature", Severity.FINE, text)], ()
    still(module)
    one = _first_position(loss_config, module, _samples(loss_config, data, 1))
    with torch.no_grad():
        columns = forward(module, one[0])[0].numel()
    if columns > ROWS:
        text = f"not compared with the exact curvature: {columns:,} outputs a term, at most {ROWS} are compared"
        return [Finding("curvature", Severity.FINE, text)], ()
    rows, symmetry = _compare(kfac, loss_config, module, loss, one, ranks, sharing=Sharing.EXPAND)
    many = _batch(_samples(loss_config, data, SAMPLES), one, columns)
    if many is None:
        return [*_judge(rows), *symmetry], rows
    further, symmetry = _compare(kfac, loss_config, module, loss, many, ranks, sharing=None)
    shown = (*(row for row in rows if row.exact), *(row for row in further if not row.exact))
    return [*_judge((*rows, *further)), *symmetry], shown


def _samples(loss: LossConfig, data: Source, count: int) -> Micro:
    [(inputs, targets)] = data.fetch([torch.arange(min(count, len(data)))], seed=0)
    if loss.name.loss_terms is LossTerms.TOKEN:
        # K-FAC's own labels ignore no position; the Hessian doesn't depend on which label there is.
        targets = targets.masked_fill(targets == loss.ignore_index, 0)
    return inputs, targets


def _first_position(loss: LossConfig, module: nn.Module, one: Micro) -> Micro:
    """Keep one token of a sequence if the model takes so short a one."""
    inputs, targets = one
    if loss.name.loss_terms is LossTerms.SAMPLE or not isinstance(inputs, Tensor):
        return one
    if inputs.ndim < 2 or inputs.shape[1] != targets.shape[1]:
        return one
    short = inputs[:, :1], targets[:, :1]
    try:
        with torch.no_grad():
            outputs = module(short[0])
    except (RuntimeError, ValueError, IndexError, AssertionError):  # a model of one fixed length
        return one
    return short if outputs.shape[:-1].numel() == 1 else one


def _batch(several: Micro, one: Micro, columns: int) -> Micro | None:
    """Return more samples, and more of their positions where one was taken; None if one sample is all that fits."""
    inputs, targets = several
    if not isinstance(inputs, Tensor) or not isinstance(one[0], Tensor) or inputs.shape[1:] == one[0].shape[1:]:
        count = min(SAMPLES, ROWS // columns)
        first = each(lambda tensor: tensor[:count], inputs)
        return (first, targets[:count]) if count > 1 and len(targets) > 1 else None
    terms = ROWS // columns
    positions = min(inputs.shape[1], math.isqrt(terms))
    count = min(len(inputs), terms // max(positions, 1))
    return (inputs[:count, :positions], targets[:count, :positions]) if terms > 1 else None


def _compare(
    config: KFACConfig,
    loss_config: LossConfig,
    module: nn.Module,
    loss: Loss,
    micro: Micro,
    ranks: Communicator,
    *,
    sharing: Sharing | None,
) -> tuple[tuple[CurvatureRow, ...], list[Finding]]:
    inputs, targets = micro
    with measuring(module, config, Fisher.TYPE2, sharing=sharing) as kfac:
        outputs = _pass(module, loss, micro, kfac)
        if any(samples is not Samples.SHARED for samples in found_shared(kfac).values()):
            outputs = _pass(module, loss, micro, kfac)
        found = _factors(kfac)
        if loss_config.name.loss_terms is LossTerms.TOKEN:
            seen = _positions_of_norms(module, inputs, kfac.coverage.blocks)
            found = {name: (values, float(seen.get(name, rows))) for name, (values, rows) in found.items()}
        symmetry = examine_symmetry(kfac, ranks)
        blocks = [block for block in kfac.coverage.blocks if block.name in found]
        others = [block for block in kfac.coverage.blocks if block.name not in found]
        names = [block.name for block in kfac.coverage.blocks]
    rows: list[CurvatureRow] = []
    if ranks.rank == 0:
        try:
            rows = _rows(config, module, loss, inputs, targets, outputs.detach(), found, blocks)
        except RuntimeError as error:  # torch can't differentiate this model in the ways that it would take
            rows = [CurvatureRow("", len(targets), 0, None, None, False, f"can't be computed: {error}".splitlines()[0])]
        rows += [
            CurvatureRow(block.name, len(targets), 0, None, None, False, "no A ⊗ G to compare, or no gradient")
            for block in others
        ]
        rows.sort(key=lambda row: names.index(row.block) if row.block else 0)
    return tuple(ranks.gather_objects(rows, label="curvature")[0]), symmetry


@torch.no_grad()
def _positions_of_norms(module: nn.Module, inputs: Inputs, blocks: Sequence[Block]) -> dict[str, int]:
    """Return how often each normalisation is used in a pass: at every position, by every head, in every call.

    For token losses each of these counts as a term of its own; where a term has more of them, as in a norm of queries
    that all heads share, the block is an approximation.
    """
    seen: dict[str, int] = {}
    handles = []
    for block in blocks:
        if isinstance(block, NormBlock):

            def count(
                _: nn.Module, args: object, output: Tensor, name: str = block.name, units: int = block.units
            ) -> None:
                seen[name] = seen.get(name, 0) + output.numel() // units

            handles += [after_forward(part, count) for part in block.modules]
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        forward(module, inputs)
    return seen


def _pass(module: nn.Module, loss: Loss, micro: Micro, kfac: KFAC) -> Tensor:
    """Measure by K-FAC's own backward; the loss's shows which blocks don't make their gradient, and have none then."""
    inputs, targets = micro
    outputs = forward(module, inputs)
    kfac.fisher_backward(outputs)
    (loss.total(outputs, targets) / loss.count(targets)).backward()
    kfac.step()
    module.zero_grad()
    return outputs


def _rows(
    config: KFACConfig,
    module: nn.Module,
    loss: Loss,
    inputs: Inputs,
    targets: Tensor,
    outputs: Tensor,
    found: Mapping[str, tuple[tuple[Tensor, ...], float]],
    blocks: list[Block],
) -> list[CurvatureRow]:
    rows = []
    vectors = hessian_rows(loss, outputs, targets)
    matrices = {name: values for name, (values, _) in found.items()}
    terms = float(loss.count(targets))
    if max((float(vector.square().sum()) for vector in vectors), default=0.0) < CERTAIN:
        said = "anything: the model is so certain here that the loss's curvature is rounding"
        return [CurvatureRow(block.name, len(targets), 0, None, None, False, said) for block in blocks]
    compared = list(compare(module, blocks, matrices, inputs, vectors, terms))
    largest = max((result.exact for _, result in compared if result is not None), default=0.0)
    for block, result in compared:
        positions = round(found[block.name][1] / len(targets))
        row = CurvatureRow(block.name, len(targets), positions, None, None, False, "")
        if result is None:
            size = torch.Size(block.matrix_shape).numel()
            said = f"{len(vectors)} rows of {size:,} entries; at most {ENTRIES:,} are held"
            rows.append(replace(row, expected=said))
        else:
            exact, said = _is_exact(block, len(targets), positions), _expected(block, len(targets), positions)
            if terms > len(targets) and terms > round(found[block.name][1]):
                exact, said = False, f"approximate: {terms:g} terms share {found[block.name][1]:g} rows"
            if result.exact <= FAINT**2 * largest:
                exact, said = False, "anything: next to no gradient, perhaps of rounding alone"
            rows.append(replace(row, error=result.error, cosine=result.cosine, exact=exact, expected=said))
    wrong = [row.block for row in rows if _differs(row)]
    if wrong:
        norms = {block.name: result.exact for block, result in compared if result is not None}
        in_double = _in_double(config, module, inputs, vectors, matrices, terms, wrong)
        rounding = {name for name, exact in in_double.items() if exact < norms[name] / 4}
        said = "anything: its gradient is rounding alone"
        rows = [replace(row, exact=False, expected=said) if row.block in rounding else row for row in rows]
    return rows


def _in_double(
    config: KFACConfig,
    module: nn.Module,
    inputs: Inputs,
    vectors: Sequence[Tensor],
    matrices: dict[str, tuple[Tensor, ...]],
    terms: float,
    names: Sequence[str],
) -> dict[str, float]:
    """Return ‖GGN‖² of some blocks by a model of doubles: where that of floats is larger by far, it is rounding."""
    double = copy.deepcopy(module).double()
    taken = each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
    blocks = [block for block in find_all(double, config).blocks if block.name in names]
    try:
        compared = list(compare(double, blocks, matrices, taken, [vector.double() for vector in vectors], terms))
    except RuntimeError:  # it computes in float32, also as a model of doubles
        return {}
    return {block.name: result.exact for block, result in compared if result is not None}


def _differs(row: CurvatureRow) -> bool:
    return row.exact and row.error is not None and not row.error < TOLERANCE


def _factors(kfac: KFAC) -> dict[str, tuple[tuple[Tensor, ...], float]]:
    """Return by block its factors, and the number of rows that made A, of terms that made F; on one rank."""
    units = measured_factors(kfac)
    found: dict[str, tuple[tuple[Tensor, ...], float]] = {}
    for block in kfac.coverage.blocks:
        own = block_units(block, kfac.solver_access.config)
        entries: Mapping[Side, Tensor] = {
            unit.side: _quotient(units[unit.name], unit, partial_trace=block.partial_traces)
            for unit in own
            if float(units[unit.name]["scalars"][0])
        }
        # Every rank measures the same samples. A, or the only factor, comes first.
        rows = float(units[own[0].name]["scalars"][0]) / kfac.communicator.size
        if set(entries) == {Side.A, Side.G}:
            found[block.name] = (entries[Side.A], entries[Side.G]), rows
        elif set(entries) == {Side.F} and own[0].kind is FactorKind.DENSE:
            found[block.name] = (entries[Side.F],), rows
    return found


def _quotient(entry: Mapping[str, Tensor], unit: Unit, *, partial_trace: bool) -> Tensor:
    """Return S/w; of a partial trace A, S/tr S, so that A ⊗ G is L ⊗ R / tr F."""
    weight, trace = entry["scalars"].tolist()
    divisor = trace if partial_trace and unit.side is Side.A and trace > 0 else weight
    quotient = entry["sum"].double() / divisor
    return complete(quotient) if unit.kind is FactorKind.DENSE else quotient


def _is_exact(block: Block, samples: int, positions: int) -> bool:
    unit_wise = block.factors[0].side is Side.F
    return positions == 1 and not block.partial_traces and (samples == 1 or unit_wise)


def _expected(block: Block, samples: int, positions: int) -> str:
    if block.partial_traces:
        return "approximate: L ⊗ R / tr F, as embedding and head are one weight"
    if block.factors[0].side is Side.F:
        return "equal, unit by unit" if positions == 1 else f"approximate: {positions} positions, each a term"
    if samples == 1 and positions == 1:
        return "equal: one sample, one position"
    if positions > 1:
        return f"approximate: {positions} positions ({block.sharing})"
    return "approximate: several samples"


def _judge(rows: tuple[CurvatureRow, ...]) -> list[Finding]:
    wrong = [row for row in rows if _differs(row)]
    if wrong:
        first = max(wrong, key=lambda row: row.error or math.inf)
        names = ", ".join(dict.fromkeys(row.block for row in wrong))
        text = (
            f"{names}: A ⊗ G differs from the exact Gauss–Newton block where it must equal it (by {first.error:.2g} "
            f"for {first.block}). Is the layer's output used as it is, by the loss of its own sample only? Otherwise "
            "name it in kfac.curvature.exclude"
        )
        return [Finding("curvature", Severity.ERROR, text)]
    exact = len({row.block for row in rows if row.exact and row.error is not None})
    close = sorted(row.cosine for row in rows if not row.exact and row.cosine is not None)
    text = f"{exact} blocks equal the exact Gauss–Newton matrix where they have to"
    if close:
        text += f"; {len(close)} approximate it, median cosine {close[len(close) // 2]:.2f}"
    return [Finding("curvature", Severity.FINE, text)]
