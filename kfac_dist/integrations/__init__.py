"""K-FAC inside of other people's training loops."""
