"""The sections of `kfac`, one file a question that they answer."""
