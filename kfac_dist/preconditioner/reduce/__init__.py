"""Local statistics → global statistics, in buckets."""
