"""Transforms of a gradient matrix at its owner, one file each; `table` has a row for each."""
