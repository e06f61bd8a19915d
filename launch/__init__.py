"""The commands: trainers with their options, data and run log, measurements, and shell recipes."""
