"""The command line: flags, commands, and what a person sees."""
