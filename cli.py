"""The `bigpipe` command. Parses, calls, prints; holds no logic."""
