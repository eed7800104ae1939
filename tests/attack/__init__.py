"""What somebody made to hurt: files, manifests, arguments, prompts, servers."""
