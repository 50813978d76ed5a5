"""The args classes: what to save, and how to restore it.

>>> from ckpt_hooks import args
>>> args.Composite(params=args.StandardSave({"w": 1.0}), config=args.JsonSave({"lr": 0.1})).keys()
dict_keys(['params', 'config'])
"""

from ckpt_hooks.handlers.composite import CompositeArgs as Composite
from ckpt_hooks.handlers.iterator import IteratorRestoreArgs as IteratorRestore
from ckpt_hooks.handlers.iterator import IteratorSaveArgs as IteratorSave
from ckpt_hooks.handlers.json import JsonRestoreArgs as JsonRestore
from ckpt_hooks.handlers.json import JsonSaveArgs as JsonSave
from ckpt_hooks.handlers.pytree import StandardRestoreArgs as StandardRestore
from ckpt_hooks.handlers.pytree import StandardSaveArgs as StandardSave

__all__ = [
    "Composite",
    "IteratorRestore",
    "IteratorSave",
    "JsonRestore",
    "JsonSave",
    "StandardRestore",
    "StandardSave",
]
