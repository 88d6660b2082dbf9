"""What is kept of a run: directories that are complete or refused, on a disk or behind a URL."""
