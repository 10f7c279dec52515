"""The embedded cohorts, one module each."""
