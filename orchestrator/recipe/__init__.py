"""From the text of a manifest to a checked graph of nodes; every problem at once, each at its place."""
