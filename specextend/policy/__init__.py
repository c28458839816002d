"""A price on time: how large a tree is worth its milliseconds, and whether to draft at all."""
