"""The trainers: options, data, killed and resumed runs."""
