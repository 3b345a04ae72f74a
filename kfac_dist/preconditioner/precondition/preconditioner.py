"""Gradients to updates: collected, transformed stack by stack as they arrive, and delivered at one length.

gradients = collect(...)                        sent to the ranks that precondition them
updates   = transform(gradients, damping)       one stage after the other for blocks; the others apart; sent back
scale     = scale(updates)                      one reduction for all stages that set a length together
deliver(updates, scale)                         into the gradients' own memory
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_dist.curvature.inverses.offload import Offload
from kfac_dist.curvature.inverses.precondition import Group
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine
from kfac_dist.preconditioner.precondition.states import TransformStates
from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, Transform, keeps_state
from kfac_dist.preconditioner.precondition.transport import Transport
from kfac_dist.preconditioner.precondition.uncovered import UncoveredGradients

# Label in the traffic for the reduction of the stages' numbers.
LABEL = "kl_clip"


@dataclass(frozen=True)
class Updates:
    """Transformed gradients, on their way back.

    Attributes:
        gradients: The gradients that they were made of, by parameter name: where they go.
        uncovered: Those of parameters without a block, flat.
        sums: Measured numbers of each stage that sets a length, by name, one per stack.
    """

    gradients: dict[str, Tensor]
    uncovered: Tensor
    sums: Mapping[str, Sequence[Tensor]]


class Preconditioner:
    """Takes gradients through the list of transforms where their blocks are preconditioned.

    Args:
        transport: Moves gradients to this rank's groups and back.
        uncovered: The gradients of parameters without a block.
        offload: Keeps the groups' inverses on the host, if it is asked for.
        transforms: By name, in the order in which they are applied.
        groups: This rank's groups.
        engine: The engine, which holds the gradients.
        communicator: All ranks.
        row: The ranks that together hold each update once.
        plain: Parameters that nothing preconditions.
        decays: Decoupled weight decay by parameter, where there is one.

    Attributes:
        transforms: By name, in the order in which they are applied.
        states: Their states.
    """

    def __init__(
        self,
        transport: Transport,
        uncovered: UncoveredGradients,
        offload: Offload | None,
        transforms: Mapping[str, Transform],
        groups: Sequence[Group],
        *,
        engine: Engine,
        communicator: Communicator,
        row: Communicator,
        plain: Sequence[str],
        decays: Mapping[str, float],
    ) -> None:
        self.transforms = transforms
        self.states = TransformStates(transforms, groups)
        self._transport = transport
        self._uncovered = uncovered
        self._offload = offload
        self._engine = engine
        self._communicator = communicator
        self._row = row
        self._plain = plain
        self._decays = decays
        self._linear = {name: stage for name, stage in transforms.items() if stage.linear}
        self._scaling = {name: stage for name, stage in transforms.items() if stage.scales}
        # On every rank alike, for any blocks.
        self._stateful = uncovered.stateful or any(keeps_state(stage) for stage in transforms.values())
        self._replacing = [t for t in transforms.values() if type(t).replace_plain is not Transform.replace_plain]
        self._names = {id(group): tuple(block.name for block in group.blocks) for group in groups}

    def collect(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Start to send gradients, by parameter name, to the ranks that precondition them; returns them."""
        if self._offload is not None:
            self._offload.begin()
        self._transport.collect(gradients)
        self._uncovered.collect(gradients)
        return gradients

    def transform(self, gradients: dict[str, Tensor], damping: float) -> Updates:
        """Return the updates of gradients that were collected; collective where they travel.

        Args:
            gradients: The result of `collect`.
            damping: λ, with the weight decay that is part of the loss.
        """
        taken = self._engine.finite_everywhere(self._communicator) if self._stateful else None
        sums: dict[str, list[Tensor]] = {name: [] for name in self._scaling}
        self._each_stack(self.transforms, damping, taken, sums)
        return Updates(gradients, self._uncovered.apply(damping, taken), sums)

    def precondition(self, gradients: dict[str, Tensor], damping: float) -> Updates:
        """Return the damped inverse's product with gradients that were collected: the linear stages alone."""
        self._each_stack(self._linear, damping, None, {})
        return Updates(gradients, self._uncovered.apply(damping, None), {})

    def scale(self, updates: Updates) -> Tensor | None:
        """Return the factor of all updates, 0-dim, the same on every rank; None if they are as long as they should be.

        Collective, unless no stage sets a length.
        """
        if not self._scaling:
            return None
        totals = torch.stack([self._total(name, updates) for name in self._scaling])
        self._row.all_reduce(totals, label=LABEL).wait()
        scales = [
            stage.scale(total, self._engine.gradient_scale)
            for stage, total in zip(self._scaling.values(), totals.unbind(), strict=True)
        ]
        return scales[0] if len(scales) == 1 else torch.stack(scales).prod()

    def deliver(self, updates: Updates, scale: Tensor | None = None) -> None:
        """Write updates, times a 0-dim factor, over the gradients that they were made of."""
        self._transport.deliver(updates.gradients, scale)
        self._uncovered.deliver(updates.gradients, updates.uncovered, scale)

    def complete(self, gradients: dict[str, Tensor]) -> None:
        """Do what is done where gradients lie, in place: replace what nothing preconditions; add decoupled decay."""
        for transform in self._replacing:
            for name in self._plain:
                if name in gradients:
                    transform.replace_plain(gradients[name], self._engine.gradient_scale)
        if self._decays:
            parameters, scale = self._engine.parameters(), self._engine.gradient_scale
            for name, decay in self._decays.items():
                if name in gradients:
                    gradients[name].add_(parameters[name], alpha=decay * scale)

    def _each_stack(
        self,
        stages: Mapping[str, Transform],
        damping: float,
        taken: Tensor | None,
        sums: Mapping[str, list[Tensor]],
    ) -> None:
        """Transform every stack by some stages as it arrives, and send the result."""
        gradient_scale = self._engine.gradient_scale
        for groups in self._transport.arriving():
            updates: list[Tensor] = []
            for group in groups if self._offload is None else self._offload.streamed(groups):
                stack = Stack(group.gradient, self._names[id(group)], damping, gradient_scale, group)
                updates.append(self._apply(stages, stack, taken, sums))
            self._transport.send(groups, updates)

    def _apply(
        self, stages: Mapping[str, Transform], stack: Stack, taken: Tensor | None, sums: Mapping[str, list[Tensor]]
    ) -> Tensor:
        update, states = stack.gradient, dict[str, dict[str, Tensor]]()
        collected = True  # whether the stack still holds the collected gradient
        for name, stage in stages.items():
            if collected and stage.stage is not Stage.GRADIENT:
                stack, collected = (stack if update is stack.gradient else replace(stack, gradient=update)), False
            state = {} if taken is None else self.states.of(name, stack.group)
            update = stage.apply(update, stack, state)
            if state:
                states[name] = state
            if name in sums:
                sums[name].append(stage.measure(update, stack.gradient))
        return update if taken is None else self.states.commit(stack.group, states, taken, update)

    def _total(self, name: str, updates: Updates) -> Tensor:
        """Return the sum over this rank of a stage's measured numbers, 0-dim."""
        sums, stage = updates.sums[name], self._scaling[name]
        total = torch.stack(list(sums)).sum() if sums else updates.uncovered.new_zeros(())
        return total + stage.measure(updates.uncovered, self._uncovered.gradient) if self._uncovered.counted else total
