"""A run's records: metrics, log lines, variance and curvature over time."""
