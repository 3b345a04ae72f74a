"""One file a kind of layer: its block, which says how its calls become rows of activations and gradients."""
