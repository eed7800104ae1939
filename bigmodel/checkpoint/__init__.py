"""What is stored: safetensors and torch zip files as named byte ranges. Nothing is unpickled into live objects."""
