"""What a model consists of: modules, tensors and ties, from its config alone or from the names of its tensors."""
