"""Beam search over a model that predicts each next token; one beam is the greedy choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist.tasks.models.translator import PAD, DecodingCache


@torch.no_grad()
def decode(model: nn.Module, source: Tensor, start: Tensor, *, end: int, length: int, beams: int = 1) -> Tensor:
    """Return the likeliest translations found, `[batch, length]`, each followed by `end` (if it fits) and padding.

    Hypotheses are compared by their mean log-likelihood a token. The number of calls of the model is `length`, whatever
    the data: under sharded engines each of them is a collective.

    Args:
        model: Called as `Translator.forward`, in evaluation mode.
        source: Tokens to translate, `[batch, positions]`.
        start: First token of each translation, `[batch]`.
        end: Token that ends a translation.
        length: Most tokens of a translation.
        beams: Hypotheses that are followed.
    """
    batch = len(source)
    cache = DecodingCache()
    source, newest = source.repeat_interleave(beams, 0), start.repeat_interleave(beams).unsqueeze(1)
    # All beams begin alike: only the first may continue, or all would stay alike.
    scores = source.new_zeros(batch, beams, dtype=torch.float32)
    scores[:, 1:] = -torch.inf
    found = source.new_zeros(batch * beams, 0)
    over = source.new_zeros(batch * beams, dtype=torch.bool)
    first = torch.arange(batch, device=source.device).unsqueeze(1) * beams
    for _ in range(length):
        likelihood = model(source, newest, cache)[:, -1].float()
        likelihood[:, PAD] = -torch.inf
        likelihood = likelihood.log_softmax(-1)
        # Finished hypotheses continue with padding, at no cost.
        likelihood.masked_fill_(over[:, None], -torch.inf)
        likelihood[:, PAD] = likelihood[:, PAD].masked_fill(over, 0.0)
        vocabulary = likelihood.shape[1]
        every = scores.unsqueeze(2) + likelihood.view(batch, beams, vocabulary)
        scores, choice = every.flatten(1).topk(beams)
        rows = (first + choice // vocabulary).flatten()
        newest = (choice % vocabulary).view(-1, 1)
        if beams > 1:
            cache.reorder(rows)
            found, over = found[rows], over[rows]
        found = torch.cat([found, newest], dim=1)
        over = over | (newest.squeeze(1) == end)
    tokens = (found != PAD).sum(1).view(batch, beams)
    best = (scores / tokens).argmax(dim=1, keepdim=True)
    return found[(first + best).flatten()]
