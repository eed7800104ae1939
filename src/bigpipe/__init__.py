"""bigpipe: recipes in git that download, size, shard, quantize, place and run models larger than memory."""
