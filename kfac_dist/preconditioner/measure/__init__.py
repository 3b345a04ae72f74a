"""Captured rows → local statistics of every block, in units of the mean loss."""
