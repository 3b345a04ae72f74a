"""Both estimators of the diagonal Fisher, on request: at first and over some steps."""
