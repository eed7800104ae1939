"""What a stage kind and the engine agree on: `Stage` and its contexts, plain values, events, the passing of files."""
