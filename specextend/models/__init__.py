"""Find, check, load and shard models; the bundled pair."""
