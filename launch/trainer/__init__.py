"""Shared by both trainers: command line, options, loop, start and resume, processes, run log."""
