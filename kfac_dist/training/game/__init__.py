"""Two players in turns or at once, each with a K-FAC of its own."""
