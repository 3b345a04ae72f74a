"""From a launcher's environment to a process group: rank, devices, rendezvous."""
