"""A run that diverges, skips steps, is preempted or restarted."""
