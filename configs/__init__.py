"""Configurations for `--config=configs/....py`, each a file with `get_config()`."""
