"""The engine: manifest, graph, plan, store, runner, launcher. Knows nothing of models; never imports torch."""
