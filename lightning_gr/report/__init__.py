"""Reports of training runs: what a run keeps of itself, how it is read again, and the page that shows it."""
