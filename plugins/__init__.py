"""The stage kinds, one file each: a params model and the functions that join the engine to the big-model library."""
