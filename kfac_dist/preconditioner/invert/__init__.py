"""Global statistics → inverses at their owners, and from there to the ranks that precondition."""
