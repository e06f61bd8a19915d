"""What a person runs: options, data, run log, trainers and shell recipes."""
