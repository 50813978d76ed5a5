"""A pytree item from disk: ours through the verified reader, everybody else's through tensorstore."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_hooks import events, tree
from ckpt_hooks.changes import EXACT, Changes, is_floating
from ckpt_hooks.devices import require_a_device
from ckpt_hooks.equinox_modules import functions_among
from ckpt_hooks.errors import CheckpointNotFoundError, CorruptCheckpointError
from ckpt_hooks.matching import SavedLeaf, fit, key_dtype, match, place_on_devices
from ckpt_hooks.shards import Parts, Spread, are_undecided, spreads_of, with_shardings
from ckpt_hooks.storage.array_info import ArrayInfo
from ckpt_hooks.storage.lookup import content_of, is_directory
from ckpt_hooks.storage.reader import Database
from ckpt_hooks.storage.regions import Region
from ckpt_hooks.tree import ARRAY_METADATA_FOLDER, METADATA_FILE, OWN_ARRAY_METADATA, SHARDING_FILE, STRINGS_FILE

__all__ = ["NO_TARGET", "SavedTree"]

NO_TARGET: Any = type("NoTarget", (), {"__repr__": lambda self: "NO_TARGET"})()


class _Arrays(Protocol):
    def info(self, name: str) -> ArrayInfo: ...
    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]: ...
    def read_regions(self, wanted: Mapping[str, Sequence[Region]]) -> dict[str, list[np.ndarray]]: ...


class SavedTree:
    """The pytree in an item's directory.

    Attributes:
      leaves: {name: the leaf as it was saved}.
      custom_metadata: what was saved beside the tree, of which `structure` has its record; None where nothing was.

    Raises CheckpointNotFoundError where there is none and CorruptCheckpointError where it is damaged.
    """

    custom_metadata: Any = None

    def __init__(self, directory: str, *, verify: bool = True) -> None:
        self._directory = directory
        self._is_ours = Database.is_ours(directory)
        metadata = self._read_metadata()
        self._records = tree.records_from_json(metadata["tree_metadata"])
        self.custom_metadata = metadata.get("custom_metadata")
        leaves = [record for record in self._records if record.value_type not in tree.EMPTY_TYPES]
        self._strings = self._read_strings()
        key_impls = self._read_key_impls()
        self._arrays = self._open(metadata, [leaf.name for leaf in leaves if leaf.name not in self._strings], verify)
        self.leaves = dict(self._describe(leaves, key_impls))

    def _describe(
        self, leaves: Iterable[tree.LeafRecord], key_impls: Mapping[str, str]
    ) -> Iterator[tuple[str, SavedLeaf]]:
        alike: dict[tuple[int, str], SavedLeaf] = {}  # most leaves of a state are like many others
        for name, _, value_type in leaves:
            info = None if name in self._strings else self._arrays.info(name)
            if name in key_impls:
                yield name, SavedLeaf(value_type, info, key_impls[name])
                continue
            leaf = alike.get((id(info), value_type))
            if leaf is None:
                leaf = alike[id(info), value_type] = SavedLeaf(value_type, info)
            yield name, leaf

    # -------------------------------------------------------------- restoring

    def restore(self, like: Any = NO_TARGET, changes: Changes = EXACT) -> Any:
        """The tree in the structure, types, dtypes and shardings of `like`, or as nested dicts and lists.

        Raises NoDeviceError where that takes a device and JAX has none.
        """
        try:
            return self._restore_into(like, changes)
        except (AssertionError, RuntimeError) as error:
            require_a_device(error)
            raise

    def _restore_into(self, like: Any, changes: Changes) -> Any:
        everything = {} if like is NO_TARGET else tree.named_leaves(like)
        saved_names = {} if changes.is_exact else changes.renamed(self.leaves, everything)
        changes.require_some(saved_names)
        if like is NO_TARGET:
            return self._restore_plain(changes)
        kept = self._kept_functions(everything, changes)
        targets = {name: leaf for name, leaf in everything.items() if name not in kept} if kept else everything
        if are_undecided(targets.values()):
            targets = self._decided(targets, saved_names)
        if changes.is_exact and not kept:
            values = self._restore_leaves(self.leaves, targets, changes)
        else:
            saved_names = saved_names or changes.renamed(self.leaves)
            leaves = {name: self.leaves[old] for name, old in saved_names.items()}
            wanted = changes.wanted(targets, leaves)
            restored = dict(zip(wanted, self._restore_leaves(leaves, wanted, changes, saved_names), strict=True))
            values = [restored.get(name, leaf) for name, leaf in everything.items()]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), values)

    def _decided(self, targets: Mapping[str, Any], saved_names: Mapping[str, str]) -> dict[str, Any]:
        """The targets, with devices where they name none."""
        encoded = self._saved_shardings()
        by_saved_name = {saved_names.get(name, name): leaf for name, leaf in targets.items()}
        decided = with_shardings(self._directory, by_saved_name, encoded)
        return {name: decided[saved_names.get(name, name)] for name in targets}

    def _saved_shardings(self) -> Mapping[str, str]:
        """{base64 of a saved name: its sharding}, as they stand in the file."""
        return _read_json(os.path.join(self._directory, SHARDING_FILE), b"NamedSharding") or {}

    def _kept_functions(self, targets: Mapping[str, Any], changes: Changes) -> frozenset[str]:
        """The functions of a target that stay as they are, nothing having been saved in their places."""
        functions = functions_among(targets)
        if not functions or changes.has_new_names:
            return functions
        return functions & {record.name for record in self._records if record.is_empty}

    def _restore_leaves(
        self,
        leaves: Mapping[str, SavedLeaf],
        targets: Mapping[str, Any],
        changes: Changes,
        saved_names: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """The values of the leaves of `like`, which `leaves` has under the same names."""
        item = os.path.basename(self._directory)
        to_fit = match(leaves, targets, changes, item=item)
        spreads = spreads_of(targets, lambda name: _shape_of(leaves[name]))
        old_names = targets if saved_names is None else {saved_names[name]: None for name in targets}
        if not spreads:
            found: dict[str, Any] = {**self._read(old_names), **self._strings}
        else:
            old_spreads = {name if saved_names is None else saved_names[name]: s for name, s in spreads.items()}
            unspread = self._read(name for name in old_names if name not in old_spreads)
            found = {**unspread, **self._strings, **self._read_parts(old_spreads)}
        if saved_names is not None:
            found = {name: found[saved_names[name]] for name in targets}
        found |= fit({name: found[name] for name in to_fit}, leaves, targets, cast=bool(changes.cast), item=item)
        values = [found[name] for name in targets]
        place_on_devices(list(targets), values, list(targets.values()), item=item)
        return values

    def _read_parts(self, spreads: Mapping[str, Spread]) -> dict[str, Parts]:
        """Of arrays that are spread over devices, what this process needs."""
        start_secs = time.perf_counter()
        found = self._arrays.read_regions({name: spread.regions for name, spread in spreads.items()})
        events.record_duration_secs(events.READ_DATA_SECS, time.perf_counter() - start_secs)
        events.record_scalar(events.READ_BYTES, sum(array.nbytes for arrays in found.values() for array in arrays))
        infos = {name: self._arrays.info(name) for name in spreads}
        return {
            name: Parts(spreads[name], infos[name].shape, infos[name].dtype, arrays) for name, arrays in found.items()
        }

    def _restore_plain(self, changes: Changes) -> Any:
        records = [record for record in self._records if changes.selects(record.name)]
        arrays = self._read(record.name for record in records if not record.is_empty)
        if isinstance(changes.cast, np.dtype):
            arrays = {
                name: array.astype(changes.cast) if is_floating(array.dtype) else array
                for name, array in arrays.items()
            }
        return tree.nest(
            (record.keys, record.empty_value() if record.is_empty else self._plain_value(record, arrays))
            for record in records
        )

    def _plain_value(self, record: tree.LeafRecord, arrays: Mapping[str, np.ndarray]) -> Any:
        saved = self.leaves[record.name]
        if saved.info is None:
            return self._strings[record.name]
        array = arrays[record.name]
        if saved.key_impl is not None:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=saved.key_impl)
        return array.item() if saved.value_type == "scalar" and array.ndim == 0 else array

    def _read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        start_secs = time.perf_counter()
        arrays = self._arrays.read([name for name in names if name not in self._strings])
        events.record_duration_secs(events.READ_DATA_SECS, time.perf_counter() - start_secs)
        events.record_scalar(events.READ_BYTES, sum([array.nbytes for array in arrays.values()]))
        return arrays

    def metadata(self) -> Any:
        """The tree with an abstract array (shape, dtype) for each leaf, and no array read."""
        return tree.nest(
            (record.keys, record.empty_value() if record.is_empty else self._abstract(record.name))
            for record in self._records
        )

    def _abstract(self, name: str) -> Any:
        saved = self.leaves[name]
        if saved.info is None:
            return str
        shape, dtype = saved.info.shape, saved.info.dtype
        if saved.key_impl is not None:
            shape, dtype = shape[:-1], key_dtype(saved.key_impl)
        return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]

    # -------------------------------------------------------------- files

    def _open(self, metadata: dict[str, Any], names: Sequence[str], verify: bool) -> _Arrays:
        if self._is_ours:
            return Database(self._directory, verify=verify)
        from ckpt_hooks.storage.foreign import ForeignArrays

        return ForeignArrays(
            self._directory,
            names,
            use_ocdbt=bool(metadata.get("use_ocdbt", True)),
            use_zarr3=bool(metadata.get("use_zarr3", False)),
            fill_missing=not metadata.get("store_array_data_equal_to_fill_value", False),
        )

    def _read_metadata(self) -> dict[str, Any]:
        path = os.path.join(self._directory, METADATA_FILE)
        metadata = _read_json(path)
        if metadata is None:
            raise CheckpointNotFoundError(
                f"{self._directory} holds no pytree: it has no file {METADATA_FILE}. Name the directory of a "
                "checkpoint, or of a pytree item in it."
            )
        if not isinstance(metadata, dict) or "tree_metadata" not in metadata:
            raise CorruptCheckpointError(f"{path} is damaged: it has no tree metadata")
        return metadata

    def _read_strings(self) -> dict[str, str]:
        expected = [record.name for record in self._records if record.value_type == "string"]
        if self._is_ours and not expected:
            return {}
        strings = _read_json(os.path.join(self._directory, STRINGS_FILE)) or {}
        missing = [name for name in expected if name not in strings]
        if missing or not isinstance(strings, dict):
            raise CorruptCheckpointError(f"{self._directory}: {STRINGS_FILE} lacks {missing}")
        return {record.name: strings[record.name] for record in self._records if record.name in strings}

    def _array_metadata_files(self) -> list[str]:
        """Ours has one; Orbax writes one a process."""
        if self._is_ours:
            return [os.path.join(self._directory, OWN_ARRAY_METADATA)]
        folder = os.path.join(self._directory, ARRAY_METADATA_FOLDER)
        return [os.path.join(folder, name) for name in os.listdir(folder)] if is_directory(folder) else []

    def _read_key_impls(self) -> dict[str, str]:
        """{name: implementation} of the typed PRNG keys."""
        impls = {}
        for path in self._array_metadata_files():
            content = _read_json(path, b"random_key_impl")
            try:
                for entry in content["array_metadatas"] if content else ():
                    array = entry["array_metadata"]
                    if array["ext_metadata"] and array["ext_metadata"].get("random_key_impl"):
                        impls[array["param_name"]] = array["ext_metadata"]["random_key_impl"]
            except (KeyError, TypeError, AttributeError) as error:
                raise CorruptCheckpointError(f"{path} is damaged: {error!r}") from error
        return impls


def _shape_of(leaf: SavedLeaf) -> tuple[int, ...]:
    assert leaf.info is not None, "what a sharding is wanted for is an array"
    return leaf.info.shape


def _read_json(path: str, holding: bytes = b"") -> Any:
    """The content of a JSON file; None where there is no such file, or it does not hold what is looked for."""
    try:
        content = content_of(path)
        return json.loads(content) if holding in content else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # also UnicodeDecodeError
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
