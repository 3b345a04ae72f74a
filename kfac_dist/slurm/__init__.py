"""Runs as SLURM jobs: scripts rendered and submitted, states reported, scaling studies planned and tabulated."""
