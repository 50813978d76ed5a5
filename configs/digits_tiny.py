"""The digits example for tests: a narrow model, and a few seconds from start to end."""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.hidden_sizes = (64,)
    config.batch_size = 64
    config.learning_rate = 1e-2
    config.num_steps = 200
    config.checkpoint_every_steps = 30
    config.log_every_steps = 50
    return config
