"""The commands that `cli.py` offers: their arguments, one call each, and what is printed."""
