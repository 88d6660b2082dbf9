"""Importers: what other projects have trained or configured, as ours."""
