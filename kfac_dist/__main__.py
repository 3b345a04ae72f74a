"""`python -m kfac_dist`, which is what `torchrun -m kfac_dist` starts on every rank."""

from kfac_dist.cli import main

if __name__ == "__main__":
    main()
