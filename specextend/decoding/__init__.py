"""The decode loop, its two backends, and what it produces."""
