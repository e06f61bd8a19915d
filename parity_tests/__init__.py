"""The test suite, which checks that both libraries and both trainers give the same numbers."""
