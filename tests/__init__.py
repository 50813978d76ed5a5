"""The tests of ckpt_hooks."""
