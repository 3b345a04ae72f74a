"""The speed of a machine and its network: profiles, measured calibrations, caches."""
