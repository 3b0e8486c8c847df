"""An experiment: its file, its graph of operations, and running it."""
