"""What a person sees of a run: the live view, what is left of it, memory, the table at the end."""
