"""Forward passes over our own caches: attention, rotary positions, target, Llama blocks."""
