"""Assignment of blocks to the ranks that invert and precondition: pure functions with the same result on every rank."""
