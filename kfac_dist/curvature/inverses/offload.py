"""Inverses on the host: a group's payloads are copied to the device when it preconditions.

    copy stream      group 0 ──▶ slot 0   group 1 ──▶ slot 1        group 2 ──▶ slot 0  …
    compute stream                 G₀⁻¹ ∇ A₀⁻¹ (slot 0)   G₁⁻¹ ∇ A₁⁻¹ (slot 1)         …

The device holds two slots, as large as the largest group, for any number of layers. While one group preconditions
the next one's payloads travel; a slot is overwritten only after the compute stream has passed the event that its last
user left. New payloads leave the device on the copy stream, too, so that what is fetched afterwards is what they
brought; the host never waits, except to read payloads itself (a refresh, a checkpoint).

On a CPU the same copies are made one after the other: nothing is saved, and every result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kfac_dist.curvature.inverses.payloads import Piece
from kfac_dist.curvature.inverses.precondition import Group

# Like blocks are batched up to so many bytes of payloads; larger groups would leave nothing on the host.
GROUP_BYTES = 32 * 2**20
_ALIGNMENT = 256


def aligned(sizes: Sequence[int]) -> list[int]:
    """Return where parts of so many bytes begin when each is aligned, and where the last one ends."""
    return [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


class Offload:
    """Keeps the payloads of groups on the host between uses.

    Args:
        groups: All groups of this rank, in the order in which they precondition.
        device: Device of the preconditioning.

    Attributes:
        host_bytes: Bytes on the host.
        device_bytes: Bytes of the slots.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._order = {id(group): place for place, group in enumerate(groups)}
        self._groups = tuple(groups)
        self._host: list[Tensor] = []
        for group in groups:
            size = aligned([tensor.nbytes for tensor in _tensors(group.pieces)])[-1]
            # Uninitialised; pinned, or copies would neither be asynchronous nor leave the host alone.
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
            _rebase(group.pieces, buffer, copy=True)
            self._host.append(buffer)
            group.home = self
        largest = max((len(buffer) for buffer in self._host), default=0)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(2, len(groups)))]
        self._free: list[torch.cuda.Event | None] = [None] * len(self._slots)
        self._arrived: dict[int, torch.cuda.Event | None] = {}
        self.host_bytes = sum(len(buffer) for buffer in self._host)
        self.device_bytes = sum(len(slot) for slot in self._slots)

    def begin(self) -> None:
        """Start to fetch the first group; its turn comes once gradients have been collected."""
        if self._groups:
            self._fetch(0)

    def streamed(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Yield groups one at a time, each with its payloads on the device for as long as it is the last one yielded.

        Args:
            groups: The next groups in the order that was given at construction.
        """
        for group in groups:
            place = self._order[id(group)]
            self._fetch(place)
            if place + 1 < len(self._groups):
                self._fetch(place + 1)
            arrived = self._arrived.pop(place)
            if arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived)
            slot = place % len(self._slots)
            _rebase(group.pieces, self._slots[slot], copy=False)
            try:
                yield group
            finally:
                _rebase(group.pieces, self._host[place], copy=False)
                self._free[slot] = self._event(on_copies=False)

    def put(self, place: Tensor, values: Tensor) -> None:
        """Write values of the device to a place on the host."""
        self._arrived.clear()  # fetched payloads may be older
        if self._stream is None:
            place.copy_(values)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._copying():
            place.copy_(values, non_blocking=True)
        values.record_stream(self._stream)

    def settle(self) -> None:
        """Wait until the payloads of `put` have arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _fetch(self, place: int) -> None:
        if place in self._arrived:
            return
        slot, buffer = place % len(self._slots), self._host[place]
        free = self._free[slot]
        if self._stream is not None and free is not None:
            self._stream.wait_event(free)
        with self._copying():
            self._slots[slot][: len(buffer)].copy_(buffer, non_blocking=True)
        self._arrived[place] = self._event(on_copies=True)

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _event(self, *, on_copies: bool) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream if on_copies else torch.cuda.current_stream(self._device))
        return event


def _tensors(pieces: Sequence[Piece]) -> list[Tensor]:
    return [tensor for piece in pieces for tensor in (piece.matrix, piece.vector) if tensor is not None]


def _rebase(pieces: Sequence[Piece], buffer: Tensor, *, copy: bool) -> None:
    """Make the pieces' tensors views of one buffer, one after the other; with their values, or with the buffer's."""
    starts = iter(aligned([tensor.nbytes for tensor in _tensors(pieces)]))

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        start = next(starts)
        place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if copy:
            place.copy_(tensor)
        return place

    for piece in pieces:
        piece.matrix, piece.vector = moved(piece.matrix), moved(piece.vector)
