"""The claims that experiments.claims tests: each a few lines over the library."""
