"""What a machine and its network do in a second: profiles, measured calibrations, caches."""
