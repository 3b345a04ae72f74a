"""Whatever a model is made of, any number of ranks trains it alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks
from tests.curvature.blocks.layers.test_rms_norm import Like
from tests.harness import run_ranks
from tests.preconditioner.models import CLASSES, Case, train
from tests.preconditioner.workloads import GLOBAL_BATCH, relative

TOLERANCE = 1e-5
# Of the way that training went: under autocast each rank rounds its own gradients to eight bits (eleven for fp16).
AUTOCAST_TOLERANCE = 2e-2


def up_and_down() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, CLASSES),
    )


class Attends(nn.Module):
    """Self-attention inside an encoder layer, then attention to another width."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.memory = nn.Linear(6, 4)
        self.cross = nn.MultiheadAttention(6, 3, kdim=4, vdim=4, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens))
        memory = self.memory(hidden[:, :3])
        return self.head(hidden + self.cross(hidden, memory, memory, need_weights=False)[0])


class Language(nn.Module):
    """A table that is embedding and head, two layers with one weight, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, 6, padding_idx=1)
        self.first, self.second, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(self.table(tokens)))))
        return self.head(self.twice(torch.sin(self.twice(hidden))))


class Traps(nn.Module):
    """In-place activations and residuals, inputs in odd layouts, frozen parts, a layer used twice.

    Args:
        recompute: Whether the body's first use is computed again in backward.
    """

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 6))
        self.frozen, self.half_frozen = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(4 * 6, CLASSES)
        self.frozen.requires_grad_(False)
        self.half_frozen.bias.requires_grad_(False)
        self.recompute = recompute

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.leaky_relu_(self.stem(images), 0.2)
        hidden = hidden.mean(2).transpose(1, 2).contiguous().transpose(1, 2)  # [B, 4, 6], not contiguous
        out = checkpoint(self.body, hidden, use_reentrant=False) if self.recompute else self.body(hidden)
        hidden = hidden + out
        hidden += self.half_frozen(self.frozen(hidden * 1.0))
        hidden = self.body(hidden[:, ::1]).mul_(0.5)  # a second use of the body, whose output is overwritten
        return self.head(hidden.flatten(1))


class Reentrant(nn.Module):
    """Layers that see gradients only in the forward passes that backward makes."""

    def __init__(self, recompute: bool = True) -> None:
        super().__init__()
        self.stem, self.head, self.recompute = nn.Linear(6, 6), nn.Linear(6, CLASSES), recompute
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.MultiheadAttention(6, 2, batch_first=True))

    def attend(self, x: Tensor) -> Tensor:
        hidden = self.body[:2](x)
        return self.body[2](hidden, hidden, hidden, need_weights=False)[0]

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images.flatten(1, 2))
        hidden = checkpoint(self.attend, hidden, use_reentrant=True) if self.recompute else self.attend(hidden)
        return self.head(hidden.mean(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.bottom = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        skip = F.silu(self.norm(self.down(images)), inplace=True)
        up = self.up(F.silu(self.bottom(skip)), output_size=skip.shape[2:])
        return self.out(torch.cat([skip, up], dim=1)).flatten(2).mT  # a label for each pixel


class Convolutions(nn.Module):
    """Groups, dilation, strides, paddings in words, and an RMS norm of one's own over each half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding="same", padding_mode="reflect")
        self.strided = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding="valid", bias=False)
        self.line = nn.Conv1d(6, 6, 3, padding="same", padding_mode="replicate", dilation=2)
        self.norm, self.head = Like("rms norm", 3), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.line(torch.tanh(self.strided(torch.tanh(self.grouped(images)))).flatten(2)))
        return self.head(self.norm(hidden.mT.unflatten(-1, (2, 3))).flatten(-2).mean(1))


def compiled() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, CLASSES))
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm over channels, two pointwise layers, a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 2, stride=2)
        self.depthwise, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), ChannelsLastNorm(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = nn.Parameter(0.5 * torch.ones(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        rows = self.norm(self.depthwise(hidden)).permute(0, 2, 3, 1)
        rows = self.scale * self.narrow(F.gelu(self.wide(rows)))
        return self.head((hidden + rows.permute(0, 3, 1, 2)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 6), nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def images(generator: torch.Generator) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=generator)


def words(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 7, (GLOBAL_BATCH, 4), generator=generator)


CASES: dict[str, Case] = {
    "traps": Case(Traps, images),
    "traps, reduce": Case(Traps, images, curvature={"sharing": "reduce", "fisher": "type2"}),
    "traps, recomputed": Case(partial(Traps, True), images),
    "traps, recomputed, drawn labels": Case(partial(Traps, True), images, curvature={"fisher": "mc"}),
    "traps, bf16": Case(Traps, images, autocast=torch.bfloat16, steps=3),
    "traps, bf16, recomputed": Case(partial(Traps, True), images, autocast=torch.bfloat16, steps=3),
    "traps, fp16": Case(Traps, images, autocast=torch.float16, scaled=True, steps=3),
    "re-entrant": Case(Reentrant, images),
    "re-entrant, not recomputed": Case(partial(Reentrant, False), images),
    "convolutions": Case(Convolutions, images),
    "convolutions, reduce": Case(Convolutions, images, curvature={"sharing": "reduce"}),
    "compiled": Case(compiled, images, steps=3),
    "u-net": Case(UNet, images, tokens=36),
    "convnext": Case(ConvNeXt, images),
    "lstm": Case(Recurrent, words, tokens=4),
    "lstm, diagonal": Case(Recurrent, words, tokens=4, curvature={"uncovered": "diagonal"}),
    "lstm, diagonal, drawn labels": Case(
        Recurrent, words, tokens=4, curvature={"uncovered": "diagonal", "fisher": "mc"}, placement="owner"
    ),
    "convnext, diagonal": Case(ConvNeXt, images, curvature={"uncovered": "diagonal"}, placement="owner"),
    "transposed convolution": Case(up_and_down, lambda g: torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=g)),
    "attention": Case(Attends, lambda g: torch.randint(0, 7, (GLOBAL_BATCH, 4), generator=g), tokens=4),
    "attention, reduce": Case(
        Attends,
        lambda g: torch.randint(0, 7, (GLOBAL_BATCH, 4), generator=g),
        tokens=4,
        curvature={"sharing": "reduce", "fisher": "mc"},
    ),
    "tied": Case(Language, lambda g: torch.randint(0, CLASSES, (GLOBAL_BATCH, 4), generator=g), tokens=4),
    "tied, sampled": Case(
        Language,
        lambda g: torch.randint(0, CLASSES, (GLOBAL_BATCH, 4), generator=g),
        tokens=4,
        curvature={"sample_fraction": 0.5, "fisher": "type2"},
    ),
}


def train_all(names: list[str]) -> dict[str, dict[str, Tensor]]:
    return {name: train(CASES[name]) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return run_ranks(1, train_all, list(CASES), process_group=False, timeout=120)[0]


def deviation(name: str, parameters: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """How far from the wanted parameters training ended, relative to how far it went."""
    start = train(replace(CASES[name], steps=0))
    away = sum(float((parameters[key] - value).square().sum()) for key, value in wanted.items())
    went = sum(float((start[key] - value).square().sum()) for key, value in wanted.items())
    return float((away / went) ** 0.5)


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_leave_the_parameters_alone(size: int, alone: dict[str, dict[str, Tensor]]) -> None:
    wrong = {}
    for results in run_ranks(size, train_all, list(CASES), timeout=120):
        for name, parameters in results.items():
            full = CASES[name].autocast is None
            error = relative(parameters, alone[name]) if full else deviation(name, parameters, alone[name])
            if not error < (TOLERANCE if full else AUTOCAST_TOLERANCE):
                wrong[name] = error
    assert not wrong


def test_recomputing_changes_nothing(alone: dict[str, dict[str, Tensor]]) -> None:
    assert relative(alone["traps, recomputed"], alone["traps"]) < TOLERANCE
    assert relative(alone["re-entrant"], alone["re-entrant, not recomputed"]) < TOLERANCE
    assert relative(alone["traps, bf16, recomputed"], alone["traps, bf16"]) < TOLERANCE


def test_half_precision_stays_close_to_full(alone: dict[str, dict[str, Tensor]]) -> None:
    full = train(replace(CASES["traps"], steps=3))
    for name in ("traps, bf16", "traps, fp16"):
        assert 0 < deviation(name, alone[name], full) < 2 * AUTOCAST_TOLERANCE


@pytest.mark.parametrize(
    ("make", "uncovered"),
    [
        (UNet, {}),
        (ConvNeXt, {"scale": "ConvNeXt has no block"}),
        (
            Recurrent,
            {f"lstm.{kind}_{side}_l0": "LSTM has no block" for kind in ("weight", "bias") for side in ("ih", "hh")},
        ),
        (
            Traps,
            {"frozen.weight": "frozen", "frozen.bias": "frozen", "half_frozen.bias": "frozen"},
        ),
    ],
)
def test_what_has_no_block_says_why(make: Callable[[], nn.Module], uncovered: dict[str, str]) -> None:
    assert find_blocks(make(), CurvatureConfig()).uncovered == uncovered
