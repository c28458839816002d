"""Training of the bundled models: `python -m scripts.train`."""
