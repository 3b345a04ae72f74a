"""Collectives for K-FAC's work, over torch.distributed or MPI, and agreement, so that no rank acts alone.

base                  the interface; groups, handles
torch_communicator    NCCL and gloo
mpi_communicator      mpi4py
recording             records the calls in place of making them
traffic               bytes that each collective moves
agreement             all ranks say the same, or all raise
straggler_watch       names the ranks that a collective waits for
lost                  tells a lost peer from an error of one's own
"""
