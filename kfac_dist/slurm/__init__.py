"""Runs as SLURM jobs: scripts rendered and submitted, states told, scaling studies planned and tabulated."""
