"""Batches: the order of samples, their devices, the terms of a loss."""
