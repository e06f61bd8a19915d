"""Timeouts after which a test gives up on a process."""

HANG = 1200.0
"""Seconds after which a process that has not ended or answered hangs.

It only ends a hang. None takes a tenth of it, on two cores that another process keeps busy.
"""
