"""Training of the bundled pair: corpus, rows, models, optimiser, generation, measurement, model card."""
