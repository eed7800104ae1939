"""A run from plan to record: the loop, one node's work, files that pass between nodes, results and run records."""
