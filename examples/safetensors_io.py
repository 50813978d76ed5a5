"""Parameters out of a run into a safetensors file, and out of such a file into a run.

    python -m examples.safetensors_io out runs/digits params.safetensors
    python -m examples.safetensors_io in params.safetensors runs/imported

`write_safetensors` writes the parameters of a checkpoint, each array under its keys joined by dots, as PyTorch calls
them. `import_safetensors` makes a run of such a file, with one checkpoint of step 0; a training begins with it through
`CheckpointHook(init_from="runs/imported")`, which compares every name, shape and dtype with those of its state, and
takes `rename=`, `cast=` and `missing=` for a file of somebody else's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ckpt_hooks import CheckpointManager


def write_safetensors(run: str, path: str, *, items: Iterable[str] = ("params",), step: Any = None) -> None:
    """Writes the arrays of some items of a checkpoint into one file.

    Args:
      run: the directory of a run.
      path: of the file; one that is there is replaced.
      items: which items, or paths below them.
      step: which checkpoint, "best", or None for the newest that verifies.

    Raises ValueError for a leaf that safetensors cannot hold, and KeyError for an item that was not saved.
    """
    with CheckpointManager(run) as manager:
        restored = manager.restore(items=items, step=step)
    arrays = dict(_named_arrays(restored if len(restored) > 1 else next(iter(restored.values()))))
    partial = f"{path}.partial"
    try:
        save_file(arrays, partial, metadata={"format": "np"})
        os.replace(partial, path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}; leave this leaf out with items=, or save it in another dtype") from error
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def read_safetensors(path: str) -> dict[str, Any]:
    """The arrays of a file as nested dicts: `dense.kernel` is {"dense": {"kernel": array}}."""
    tree: dict[str, Any] = {}
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118, for it cannot be iterated
            *above, last = name.split(".")
            node = tree
            for key in above:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise ValueError(f"{path}: {name} is below an array, so it has no place in a tree")
            if last in node:
                raise ValueError(f"{path}: {name} is an array, and has others below it")
            node[last] = file.get_tensor(name)
    return tree


def import_safetensors(path: str, run: str, *, item: str = "params") -> None:
    """Makes the run `run`, whose checkpoint of step 0 has the arrays of the file as one item.

    Raises ValueError where the run has a checkpoint already.
    """
    with CheckpointManager(run) as manager:
        manager.save(0, {item: read_safetensors(path)}, metadata={"imported_from": os.path.abspath(path)})


def _named_arrays(tree: Any, name: str = "") -> Iterable[tuple[str, np.ndarray]]:
    if isinstance(tree, Mapping | list):
        for key, child in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _named_arrays(child, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, np.ndarray):
        yield name, np.array(tree, order="C")  # safetensors writes the bytes as they lie, whatever their strides say
    elif tree is not None:
        raise ValueError(f"{name} is of type {type(tree).__qualname__}; safetensors files hold arrays only")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Parameters to and from safetensors files.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, first, second in (("out", "run", "file"), ("in", "file", "run")):
        subparser = commands.add_parser(command)
        subparser.add_argument(first)
        subparser.add_argument(second)
    options = parser.parse_args(arguments)
    if options.command == "out":
        write_safetensors(options.run, options.file)
    else:
        import_safetensors(options.file, options.run)


if __name__ == "__main__":
    main()
