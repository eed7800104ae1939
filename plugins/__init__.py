"""The stage kinds: `shard.py` says what a kind takes and gives, `sharding.py` does it and is imported only then.

Both only join the engine to the big-model library.
"""
