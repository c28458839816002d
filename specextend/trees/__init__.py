"""Draft trees: what the target verifies, and which of it it accepts."""
