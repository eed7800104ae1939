"""What a model needs: bytes of weights, cache, activations and training, and the smallest change that fits."""
