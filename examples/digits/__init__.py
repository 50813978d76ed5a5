"""A Flax model trained on handwritten digits, which may be stopped and resumed at any step."""
