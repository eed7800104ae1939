"""Checkpoints and what goes with them, written in one pass and constant memory, and brought to their destination."""
