"""The suite that holds both libraries and both trainers to the same numbers."""
