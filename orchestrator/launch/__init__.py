"""One attempt of a node: in this process, in a child, or as ranks; nobody is left behind."""
