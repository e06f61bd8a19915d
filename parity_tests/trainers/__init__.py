"""The trainers: options, data, runs that are killed and resumed."""
