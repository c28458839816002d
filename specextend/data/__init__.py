"""Prompts, conversation templates, and the preparation of data sets."""
