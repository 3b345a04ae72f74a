"""K-FAC's mathematics in one process: pure tensors, no ranks, no collectives.

The one layout that everything here relies on: activations `a: [B, T, d_in(+1)]`, output gradients
`g: [B, T, d_out]`, weight gradients `[d_out, d_in(+1)]` (a bias is the homogeneous last column), where B counts samples
and T the positions that share a weight. Layers whose weight falls into independent parts (groups of a convolution,
units of a normalisation) carry those parts as a leading batch dimension.
"""
