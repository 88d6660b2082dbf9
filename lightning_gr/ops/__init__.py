"""Functions on jagged tensors; torch only, each with an obvious reference."""
