"""Output for people: progress while a run trains, a table and a picture of the losses when it ends."""
