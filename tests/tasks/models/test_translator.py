"""The encoder-decoder: who sees what, decoding by the cache, and K-FAC on it for any number of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from kfac_dist import KFAC
from kfac_dist.config.schema import Config, Sharing
from kfac_dist.doctor import examine
from kfac_dist.tasks.decoding import decode
from kfac_dist.tasks.models.translator import Translator, translator
from kfac_dist.tasks.scores import IGNORED
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from tests.harness import run_ranks
from tests.tasks.copying import END, LENGTH, PAD, START, VOCABULARY, held_out, pairs
from tests.training.runs import launched, small_config

SIZES = {"layers": 1, "width": 16, "heads": 2, "context": LENGTH, "vocabulary": VOCABULARY}


def model(*, tied: bool = True) -> Translator:
    torch.manual_seed(0)
    return translator(layers=2, width=16, heads=2, context=LENGTH, vocabulary=VOCABULARY, tied=tied)


def gradient_of(built: Translator, source: Tensor, prefix: Tensor, position: int) -> dict[str, Tensor]:
    """By side, how strongly the logits at a position depend on each position's embedding, `[batch, positions]`."""
    seen: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = built.tokens.register_forward_hook(keep)
    built(source, prefix)[:, position].square().sum().backward()
    handle.remove()
    embedded_source, embedded_prefix = seen
    return {"source": embedded_source.grad.abs().sum(-1), "prefix": embedded_prefix.grad.abs().sum(-1)}  # type: ignore[union-attr]


def test_the_future_and_the_padding_do_not_leak() -> None:
    source = torch.tensor([[3, 4, 5, PAD], [6, PAD, PAD, PAD]])
    prefix = torch.tensor([[START, 3, 4, 5, PAD], [START, 6, PAD, PAD, PAD]])
    for position in (0, 1):
        found = gradient_of(model(), source, prefix, position)
        assert (found["prefix"][:, : position + 1] > 0).all()
        assert (found["prefix"][:, position + 1 :] == 0).all()
        assert ((found["source"] > 0) == (source != PAD)).all(), "every token of the source, and nothing else"


def test_samples_do_not_depend_on_what_they_are_padded_to() -> None:
    built = model()
    short = built(torch.tensor([[3, 4]]), torch.tensor([[START, 3]]))
    padded = built(torch.tensor([[3, 4, PAD, PAD]]), torch.tensor([[START, 3, PAD, PAD]]))
    torch.testing.assert_close(short, padded[:, :2])


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_the_cache_finds_what_whole_passes_find(beams: int) -> None:
    """Beam search by hand: extend every hypothesis by every token, keep the likeliest."""
    built = model().eval()
    with torch.no_grad():
        built.tokens.weight *= 12  # far from uniform
    for source, *_ in list(held_out())[:4]:
        beam: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(LENGTH):
            extended = []
            for likelihood, tokens in beam:
                if tokens[-1:] in ([END], [PAD]):
                    extended.append((likelihood, [*tokens, PAD]))
                    continue
                with torch.no_grad():
                    logits = built(source[None], torch.tensor([[START, *tokens]]))[0, -1]
                logits[PAD] = -torch.inf
                values = logits.log_softmax(-1).tolist()
                extended += [(likelihood + value, [*tokens, token]) for token, value in enumerate(values) if token]
            beam = sorted(extended, key=lambda entry: -entry[0])[:beams]
        best = max(beam, key=lambda entry: entry[0] / sum(token != PAD for token in entry[1]))[1]
        found = decode(built, source[None], torch.tensor([START]), end=END, length=LENGTH, beams=beams)
        assert found.tolist() == [best]


def test_it_learns_to_copy_and_decodes_it() -> None:
    torch.manual_seed(0)
    built = translator(layers=1, width=32, heads=2, context=LENGTH, vocabulary=VOCABULARY)
    source, prefix, target = pairs(400, 0).tensors
    optimizer = torch.optim.SGD(built.parameters(), lr=0.3, momentum=0.9)
    config = {
        "curvature": {"loss_terms": "token", "sharing": "reduce", "factor_every": 5},
        "inversion": {"inverse_every": 10, "damping": 0.1},
        "update": {"kl_clip": 0.01, "kl_clip_lr": 0.3},
    }
    kfac = KFAC(built, config, optimizer=optimizer)
    for step in range(100):
        rows = torch.arange(step * 40, step * 40 + 40) % 400
        terms = (target[rows] != IGNORED).sum()
        kfac.micro_batch(divisor=terms.float(), terms=terms)
        outputs = built(source[rows], prefix[rows])
        functional.cross_entropy(outputs.flatten(0, 1), target[rows].flatten(), ignore_index=IGNORED).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    kfac.remove()
    unseen, starts, wanted = pairs(100, 5).tensors
    found = decode(built.eval(), unseen, starts[:, 0], end=END, length=LENGTH)
    assert (found == wanted.masked_fill(wanted == IGNORED, PAD)).all(1).float().mean() > 0.9


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width \(8\) must be a multiple of heads \(3\)"):
        translator(width=8, heads=3)


# ---- through the training loop


def config(directory: str, *, sharing: str = "reduce") -> Config:
    plain = small_config(
        directory,
        kfac=True,
        model={"name": "translator", "args": SIZES},
        data={"name": "tests.tasks.copying:copying"},
        loss={"name": "token_cross_entropy"},
        train={"batch_size": 16, "steps": 6, "log_every": 1, "evaluate_every": 3},
    )
    curvature = plain.kfac.curvature.model_copy(update={"sharing": Sharing(sharing)})
    return plain.model_copy(update={"kfac": plain.kfac.model_copy(update={"curvature": curvature})})


def _train(directory: str) -> None:
    if dist.is_initialized():
        os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    for sharing in ("reduce", "expand"):
        train(config(f"{directory}/{sharing}", sharing=sharing), quiet=True)


def test_three_ranks_take_the_steps_of_one_and_score_the_same(tmp_path: Path) -> None:
    _train(f"{tmp_path}/alone")
    run_ranks(3, _train, f"{tmp_path}/ranks", timeout=120)
    for sharing in ("reduce", "expand"):
        alone, ranks = (tmp_path / place / sharing / "small" for place in ("alone", "ranks"))
        expected, found = (read_metrics(place / "metrics.jsonl") for place in (alone, ranks))
        assert [r["loss"] for r in found if "loss" in r] == pytest.approx(
            [r["loss"] for r in expected if "loss" in r], rel=1e-5
        )
        assert [r["score/copied"] for r in found if "test_loss" in r] == [
            r["score/copied"] for r in expected if "test_loss" in r
        ]
        results = [json.loads((place / "result.json").read_text())[0] for place in (alone, ranks)]
        assert results[0]["scores"] == results[1]["scores"]
        assert results[0]["scores"]["samples"] == 11
        assert results[1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-5)


def test_the_doctor_finds_a_block_for_every_parameter(tmp_path: Path) -> None:
    report = examine(config(str(tmp_path)))
    assert report.parameters
    assert not [row.name for row in report.parameters if row.block is None]
    assert report.ready, report.findings
