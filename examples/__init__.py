"""Examples: run them from the repository's root, e.g. `python -m examples.digits.main`."""
