"""`python -m kfac_dist`, the entry point of `torchrun -m kfac_dist` on every rank."""

from kfac_dist.cli import main

if __name__ == "__main__":
    main()
