"""Who proposes tokens, and from which part of the context."""
