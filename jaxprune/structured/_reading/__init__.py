"""Which axes of a function lose their units together, read off its jaxpr."""
