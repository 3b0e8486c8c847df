"""What every package here may use: configuration, errors, files, locks, randomness, statistics, progress."""
