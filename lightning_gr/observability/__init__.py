"""What monitors and reports are made of: counts of batches, peak rates, sums over ranks, and what loggers are told."""
