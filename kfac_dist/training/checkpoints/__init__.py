"""A run's state on disk: written by all ranks, read by any number of them."""
