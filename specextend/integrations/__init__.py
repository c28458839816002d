"""Doors in other libraries: transformers' `generate`."""
