"""What is kept, and the parameters and functions that are smaller for it."""
