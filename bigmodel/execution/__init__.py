"""Models that run over GPUs, RAM and disk: loaded from the files that exist, streamed, generating."""
