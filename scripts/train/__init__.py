"""Training of the bundled models, and of EAGLE heads for any target: `python -m scripts.train`."""
