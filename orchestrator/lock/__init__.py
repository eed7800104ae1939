"""The lock file of a recipe: what it was made of and what came out, for review."""
