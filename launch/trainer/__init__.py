"""What both trainers share: command line, options, loop, start and resume, processes, log."""
