"""Statistics by class: the class of each row, the sums that are kept apart, and the Kronecker product nearest to them.

`E[aaᵀ ⊗ ĝĝᵀ] = Σ_c π_c E_c[aaᵀ ⊗ ĝĝᵀ]` for any variable c; K-FAC's approximation, that a and ĝ are independent, is
then made inside each class alone. c is the label whose loss the gradient comes from:

    empirical   the data's label                                                   given by the loop
    mc          the label that was drawn from the model                            the Fisher knows no other
    type2       column c of the Hessian's square root, in which a term has a share of p_c     exact

With the data's labels under `mc` the classes would belong to another distribution than the gradients do.

Rows `[batch, M, d]` are ordered by sample, then position. A label a sample is every position's; labels by position
need as many rows.

The Kronecker product that is nearest to `F = Σ_c π_c A_c⊗G_c`: its Kronecker SVD's first term, by power iteration.

Van Loan & Pitsianis (1993): rearranged, `A⊗G` is the outer product `vec A vec Gᵀ`, so that F becomes the matrix
`Σ_c π_c vec A_c vec G_cᵀ` of rank C, whose leading singular vectors are the best A and G in Frobenius norm. Its power
iteration,

    A ← Σ_c π_c ⟨G_c, G⟩ A_c / ⟨G, G⟩        G ← Σ_c π_c ⟨A_c, A⟩ G_c / ⟨A, A⟩,

never leaves the span of the classes' factors. With `A = Σ_c α_c A_c` and `G = Σ_c β_c G_c` all that it needs are the
inner products `P_cd = ⟨A_c, A_d⟩` and `Q_cd = ⟨G_c, G_d⟩`, C×C each:

    α_c ← π_c (Qβ)_c / βᵀQβ                  β_c ← π_c (Pα)_c / αᵀPα

Each half is the least-squares solution given the other, so that the distance to F falls at every step; it begins at
`E[A]⊗E[G]` and can't end above it. Inner products of positive semi-definite matrices are not negative, hence neither
are α and β: the result is symmetric and positive semi-definite. And the owners of A and of G, which may be two ranks,
have to tell each other no more than these few numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_dist.curvature.device_ops import to_device
from kfac_dist.curvature.gram import accumulate_gram
from kfac_dist.errors import ModelError


@dataclass(frozen=True)
class Members:
    """The classes of one layer's rows.

    Attributes:
        number: C, with the class of what has no label where there is one.
        labels: `[M]`, in [0, C); other values are in no class. None if all rows have a share in one class.
        index: That class.
        shares: `[M]`, the rows' shares in it.
        weigh: Whether products are to be multiplied by the shares; gradients that are sent back have theirs in them.
    """

    number: int
    labels: Tensor | None
    index: int = 0
    shares: Tensor | None = None
    weigh: bool = True

    def kept(self, select: Callable[[Tensor], Tensor]) -> Members:
        """Return the classes of some of the rows."""
        labels, shares = (None if values is None else select(values) for values in (self.labels, self.shares))
        return replace(self, labels=labels, shares=shares)

    def counts(self, device: torch.device) -> Tensor:
        """Return `[C]`: rows by class, without a look at the labels."""
        if self.labels is None:
            assert self.shares is not None
            counts = self.shares.new_zeros(self.number)
            counts[self.index] = self.shares.sum()
        else:
            counts = torch.zeros(self.number + 1, device=self.labels.device, dtype=torch.float32)
            counts.index_add_(0, self.labels, torch.ones_like(self.labels, dtype=counts.dtype))
            counts = counts[:-1]
        return to_device(counts, device)

    def accumulate(self, out: Tensor, rows: Tensor, *, alpha: float, ones: bool) -> None:
        """Add `alpha·[rows, 1]ᵀ[rows, 1]` of each class's rows to its own matrices.

        Where the host knows the labels, rows are put in order by class, and each is multiplied once. If only a GPU
        does, their number in a class is not known without waiting for it: every class multiplies all rows, most by 0.

        Args:
            out: `[C, batch, n, n]`, fp32.
            rows: `[batch, M, d]`, see `gram.accumulate_gram`.
            alpha: Scale.
            ones: Whether rows carry an implicit column of ones.
        """
        if self.labels is None:
            shares = self.shares if self.weigh else None
            accumulate_gram(out[self.index], rows, alpha=alpha, beta=1.0, ones=ones, weights=shares)
        elif self.labels.device.type == "cpu":
            order = self.labels.argsort(stable=True)
            found, lengths = torch.unique_consecutive(self.labels[order], return_counts=True)
            ordered = rows[:, to_device(order, rows.device)]
            for label, own in zip(found.tolist(), ordered.split(lengths.tolist(), dim=1), strict=True):
                if label < self.number:
                    accumulate_gram(out[label], own, alpha=alpha, beta=1.0, ones=ones)
        else:
            self.accumulate_masked(out, rows, alpha=alpha, ones=ones)

    def accumulate_masked(self, out: Tensor, rows: Tensor, *, alpha: float, ones: bool) -> None:
        """Accumulate for labels whose values the host doesn't know; see `accumulate`."""
        assert self.labels is not None
        for label in range(self.number):
            mask = (self.labels == label).to(out.dtype)
            accumulate_gram(out[label], rows, alpha=alpha, beta=1.0, ones=ones, weights=mask)

    def frequencies(self, tokens: Tensor, number: int) -> Tensor:
        """Return `[C, number]`: how often each token stands in rows of each class, for `tokens: [M]`."""
        counts = torch.zeros(self.number + 1, number, device=tokens.device, dtype=torch.float32)
        if self.labels is None:
            assert self.shares is not None
            counts[self.index].index_add_(0, tokens, self.shares.to(counts.dtype))
        else:
            ones = torch.ones_like(tokens, dtype=counts.dtype)
            counts.view(-1).index_add_(0, to_device(self.labels, tokens.device) * number + tokens, ones)
        return counts[:-1]


@dataclass(frozen=True)
class Classes:
    """The classes of one micro-batch's terms.

    Attributes:
        number: C, with the class of what has no label where there is one.
        labels: `[B]`, or `[B, T]` for a label per token: in [0, C), or C for terms without a label. None if `shares`
            are given.
        index: The class of a `type2` column.
        shares: `[B]` or `[B, T]`: each term's probability of it.
    """

    number: int
    labels: Tensor | None = None
    index: int = 0
    shares: Tensor | None = None

    @classmethod
    def of(cls, labels: Tensor, number: int, slots: int) -> Classes:
        """Return the classes of labels.

        Args:
            labels: `[B]` or `[B, T]`, whole numbers; terms outside of [0, C) have no label.
            number: C.
            slots: C, or C + 1 if terms without a label are a separate class.
        """
        labels = labels.detach().long()
        return cls(slots, torch.where((labels >= 0) & (labels < number), labels, number))

    def counts(self, terms: float | Tensor) -> Tensor:
        """Return a number of terms shared out over the classes `[C]`, as the labels or the shares in one class are."""
        values = self.labels if self.labels is not None else self.shares
        assert values is not None
        members = Members(self.number, values.reshape(-1))
        if self.labels is None:
            members = Members(self.number, None, self.index, values.reshape(-1))
        counts = members.counts(values.device)
        return (
            counts * (to_device(terms, counts.device) if isinstance(terms, Tensor) else terms) / max(values.numel(), 1)
        )

    def members(self, layer: str, rows: int, *, inputs: bool) -> Members:
        """Return the classes of a layer's rows.

        Args:
            layer: Its name, for messages.
            rows: M, before any are left out by sampling.
            inputs: Whether they are inputs, not gradients.

        Raises:
            ModelError: The labels don't fit the rows.
        """
        values = self.labels if self.labels is not None else self.shares
        assert values is not None
        if values.ndim == 1 and len(values) and rows % len(values) == 0:
            spread = values.repeat_interleave(rows // len(values))
        elif values.numel() == rows:
            spread = values.reshape(-1)
        else:
            raise ModelError(
                f"kfac.curvature.class_conditional: layer {layer} has {rows} rows for labels of shape "
                f"{list(values.shape)}: give one label a sample, or a label for each of its positions (with "
                "kfac.curvature.sharing: expand); or name the layer in kfac.curvature.exclude"
            )
        if self.labels is not None:
            return Members(self.number, spread)
        return Members(self.number, None, self.index, spread, weigh=inputs)


_STEPS = 200
_TOLERANCE = 1e-7
_PANEL = 128


@dataclass(frozen=True)
class Summary:
    """The owner's figures of a unit's factors by class.

    Attributes:
        products: `[batch, C, C]`: ⟨M_c, M_d⟩ of each matrix of the batch.
        traces: `[batch, C]`: tr M_c.
    """

    products: Tensor
    traces: Tensor

    @staticmethod
    def numel(batch: int, classes: int) -> int:
        """Return the number of values."""
        return batch * classes * (classes + 1)

    def flat(self) -> Tensor:
        """Return all of it, one after the other."""
        return torch.cat([self.products.flatten(), self.traces.flatten()])

    @classmethod
    def of_flat(cls, values: Tensor, batch: int, classes: int) -> Summary:
        """Return the inverse of `flat`."""
        products = values[: batch * classes**2].view(batch, classes, classes)
        return cls(products, values[batch * classes**2 :].view(batch, classes))


def summarize(sums: Tensor, weights: Tensor) -> Summary:
    """Return the inner products and traces of one unit's factors `S_c / w_c`; a class without weight has the factor 0.

    Args:
        sums: `[C, batch, n, n]`, of which the upper triangle is enough, or `[C, batch, n]` diagonals.
        weights: `[C]`.
    """
    dtype = torch.promote_types(sums.dtype, weights.dtype)
    scale = torch.where(weights > 0, 1 / weights.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)
    if sums.ndim == 3:
        diagonals = sums.to(dtype) * scale[:, None, None]
        products = diagonals.movedim(0, 1) @ diagonals.movedim(0, 1).mT
        return Summary(products, diagonals.sum(-1).mT)
    classes, batch, n, _ = sums.shape
    products = sums.new_zeros(batch, classes, classes, dtype=dtype)
    traces = sums.new_zeros(batch, classes, dtype=dtype)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        # ⟨X, Y⟩ = 2⟨triu X, triu Y⟩ − ⟨diag X, diag Y⟩ of symmetric matrices, some rows at a time.
        panel = (sums[:, :, start:stop, start:].to(dtype) * scale[:, None, None, None]).triu()
        diagonal = panel.diagonal(dim1=-2, dim2=-1).movedim(0, 1)
        rows = panel.movedim(0, 1).flatten(2)
        products += 2 * rows @ rows.mT - diagonal @ diagonal.mT
        traces += diagonal.sum(-1)
    return Summary(products, traces)


def nearest(
    products_a: Tensor, products_g: Tensor, frequencies: Tensor, tolerance: float = _TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Return α and β `[batch, C]` of the Kronecker product `(Σ α_c A_c) ⊗ (Σ β_c G_c)` that is nearest to F.

    Args:
        products_a: P `[batch, C, C]`, on the host.
        products_g: Q `[batch, C, C]`.
        frequencies: π `[C]`, adding up to 1.
        tolerance: Relative change of α below which it has settled.
    """
    p, q, pi = products_a.double(), products_g.double(), frequencies.double()
    alpha, beta = pi.expand(p.shape[:2]), pi.expand(p.shape[:2])
    for _ in range(_STEPS):
        previous = alpha
        alpha = _half(q, beta, pi, alpha)
        beta = _half(p, alpha, pi, beta)
        if bool(((alpha - previous).abs().amax(-1) <= tolerance * alpha.abs().amax(-1)).all()):
            break
    return alpha, beta


def _half(products: Tensor, coefficients: Tensor, frequencies: Tensor, otherwise: Tensor) -> Tensor:
    """Return one half of the iteration; the previous values where a factor is 0 or not finite."""
    inner = (products @ coefficients[:, :, None]).squeeze(-1)
    length = (inner * coefficients).sum(-1, keepdim=True)
    new = frequencies * inner.clamp(min=0) / length
    return torch.where((length > 0) & torch.isfinite(new).all(-1, keepdim=True), new, otherwise)
