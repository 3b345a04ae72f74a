"""Programs that measure: each writes one JSON file with the machine, the settings, medians and ratios."""
