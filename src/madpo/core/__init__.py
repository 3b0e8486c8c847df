"""What every room may use: configuration, errors, files, locks, randomness, statistics, progress."""
