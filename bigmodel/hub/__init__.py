"""The Hugging Face Hub: commits, access, headers by range, verified snapshots, and errors with a cure."""
