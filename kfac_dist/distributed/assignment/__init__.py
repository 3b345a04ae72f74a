"""Which rank inverts and preconditions which block: pure functions that every rank evaluates to the same result."""
