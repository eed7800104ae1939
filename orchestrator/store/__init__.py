"""What computations gave, by key, and their bytes, by content; what runs did, and what recipes were made of."""
