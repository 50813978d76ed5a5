"""Data iterators in a run: Grain's, our own, and what runs ahead; other libraries' files, other process counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from etils import epath
from grain.checkpoint import CheckpointHandler as GrainHandler

from ckpt_hooks import (
    CheckpointHook,
    CheckpointManager,
    IteratorCheckpointHandler,
    RunAhead,
    ShuffledIndices,
    args,
    errors,
    processes,
)

NUM_EXAMPLES, BATCH_SIZE = 50, 4


class Squares(grain.sources.RandomAccessDataSource[int]):
    """Examples; Grain checks on restore that the source is the same, by its repr."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: SupportsIndex) -> int:
        return int(index) ** 2

    def __repr__(self) -> str:
        return "Squares()"


def data_loader(worker_count: int = 0) -> Any:
    sampler = grain.samplers.IndexSampler(NUM_EXAMPLES, shuffle=True, seed=3)
    batches = [grain.transforms.Batch(BATCH_SIZE)]
    loader: Any = grain.DataLoader(
        data_source=Squares(), sampler=sampler, operations=batches, worker_count=worker_count
    )
    return iter(loader)


def map_dataset() -> Any:
    dataset = grain.MapDataset.source(Squares()).seed(5)
    return dataset.shuffle().repeat().batch(BATCH_SIZE)


def map_iterator() -> Any:
    return iter(map_dataset().to_iter_dataset())


def threads_ahead() -> Any:
    return iter(map_dataset().to_iter_dataset(grain.ReadOptions(num_threads=3, prefetch_buffer_size=20)))


def process_ahead() -> Any:
    """A worker process that runs ahead of the loop."""
    flags.FLAGS.mark_as_parsed()  # Grain asks for one of its flags, and there is no absl app here
    dataset = map_dataset().to_iter_dataset()
    return iter(dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(1, per_worker_buffer_size=4)))


def mixed_and_packed() -> Any:
    """A state of several iterators inside one another."""
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    parts = [grain.MapDataset.range(n).shuffle(seed=n).repeat().to_iter_dataset(no_threads) for n in (7, 11)]
    return iter(grain.IterDataset.mix(parts, weights=[0.3, 0.7]).batch(3))


def elastic(index: int = 0, count: int = 1) -> Any:
    dataset = grain.MapDataset.range(64).shuffle(seed=1)
    options = grain.sharding.ShardOptions(shard_index=index, shard_count=count)
    return iter(grain.experimental.ElasticIterator(dataset, 8, options))


def shuffled_indices() -> Any:
    return ShuffledIndices(NUM_EXAMPLES, BATCH_SIZE, seed=3)


def run_ahead_of_grain() -> Any:
    return RunAhead(map_iterator(), num_ahead=3, put=jax.device_put)


MAKERS = [data_loader, map_iterator, threads_ahead, mixed_and_packed, elastic, shuffled_indices, run_ahead_of_grain]


def drawn(iterator: Any, count: int) -> list[Any]:
    return [np.asarray(next(iterator)).tolist() for _ in range(count)]


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("make", [*MAKERS, process_ahead], ids=lambda make: make.__name__)
def test_the_next_batch_after_a_restore_is_the_next_one(make: Callable[[], Any], tmp_path: Path) -> None:
    """A run that is resumed sees the very batches that an uninterrupted one sees, though saves go on behind it."""
    expected = drawn(map_iterator() if make is process_ahead else make(), 7)
    data = make()
    with CheckpointHook(tmp_path, on_steps=(3,)) as hook:
        for step in range(6):  # saved at 3, and drawn on from while the save is written
            assert np.asarray(next(data)).tolist() == expected[step]
            hook(step + 1, {"step": step + 1}, data=data)
    resumed = make()
    next(resumed)  # wherever it is
    with CheckpointHook(tmp_path) as hook:
        assert hook.restore({"step": 0}, data=resumed) == {"step": 3}
    assert drawn(resumed, 4) == expected[3:]


def test_state_is_of_the_call_and_not_of_the_write(tmp_path: Path) -> None:
    """A state that its iterator goes on changing is saved as it was at the step, also where the write comes late."""

    class Live(Iterator[int]):
        def __init__(self) -> None:
            self.state = {"position": 0}

        def __next__(self) -> int:
            self.state["position"] += 1
            return self.state["position"]

        def get_state(self) -> dict[str, int]:
            return self.state  # itself

        def set_state(self, state: dict[str, int]) -> None:
            self.state = state

    data = Live()
    handler = IteratorCheckpointHandler()
    staged = handler.stage(args.IteratorSave(data))
    next(data)
    staged.write(epath.Path(tmp_path))
    assert handler.restore(epath.Path(tmp_path)) == {"position": 0}


# ------------------------------------------------------------------ Grain's handler, through Orbax


@pytest.mark.parametrize("make", [data_loader, map_iterator, mixed_and_packed], ids=lambda make: make.__name__)
def test_what_grain_saved_through_orbax_is_restored(make: Callable[[], Any], tmp_path: Path) -> None:
    """A run of Orbax with a Grain iterator goes on with ours: state, iterator, and the next batch."""
    data, expected = make(), drawn(make(), 5)
    drawn(data, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = {"w": jnp.arange(3.0)}
        composite = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
        manager.save(3, args=composite)
    resumed = make()
    restored = CheckpointManager(tmp_path).restore({"state": {"w": jnp.zeros(3)}}, data=resumed)
    assert restored["state"]["w"].tolist() == [0, 1, 2]
    assert drawn(resumed, 2) == expected[3:]


@pytest.mark.parametrize("make", [data_loader, map_iterator, mixed_and_packed], ids=lambda make: make.__name__)
def test_grain_restores_ours_through_orbax(make: Callable[[], Any], tmp_path: Path) -> None:
    """Orbax with Grain's own handler goes on from a checkpoint of ours with the next batch."""
    data, expected = make(), drawn(make(), 5)
    drawn(data, 3)
    with CheckpointManager(tmp_path) as ours:
        ours.save(3, {"state": {"w": jnp.arange(3.0)}}, data=data)
    resumed = make()
    with ocp.CheckpointManager(tmp_path) as manager:
        composite = ocp.args.Composite(
            state=ocp.args.StandardRestore({"w": jnp.zeros(3)}), data=grain.checkpoint.CheckpointRestore(resumed)
        )
        restored = manager.restore(3, args=composite)
    assert restored.state["w"].tolist() == [0, 1, 2]
    assert drawn(resumed, 2) == expected[3:]


def test_files_are_what_grain_writes(tmp_path: Path) -> None:
    """The file of a data loader has, byte for byte, what Grain's handler writes, and holds no wrapping of ours."""
    data = data_loader()
    drawn(data, 2)
    for directory in ("ours", "grains"):
        (tmp_path / directory).mkdir()
    IteratorCheckpointHandler().save(epath.Path(tmp_path / "ours"), args.IteratorSave(data))
    GrainHandler().save(epath.Path(tmp_path / "grains"), item=data)
    name = "process_0-of-1.json"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "grains" / name).read_bytes()


@pytest.mark.parametrize("state", [b"{}", b'{"a": 1}', b" 3", b'{"$bytes": "AA=="}', b'"\xff"', b"", b"NaN", b"{"])
def test_bytes_come_back_as_bytes(state: bytes, tmp_path: Path) -> None:
    """Bytes are bytes again, whether they are JSON, look like ours, or neither; also without an object to restore."""

    class Bytes:
        def __init__(self, state: bytes = b"") -> None:
            self.state = state

        def get_state(self) -> bytes:
            return self.state

        def set_state(self, state: bytes) -> None:
            self.state = state

    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"step": 1}, data=Bytes(state))
    assert manager.restore()["data"] == state
    other = Bytes()
    manager.restore({"step": 0}, data=other)
    assert other.state == state


# ------------------------------------------------------------------ another number of processes


def as_process(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    monkeypatch.setattr(processes, "index", lambda: index)
    monkeypatch.setattr(processes, "count", lambda: count)


def save_as(monkeypatch: pytest.MonkeyPatch, directory: Path, iterators: list[Any]) -> None:
    for index, iterator in enumerate(iterators):
        as_process(monkeypatch, index, len(iterators))
        IteratorCheckpointHandler().save(epath.Path(directory), args.IteratorSave(iterator))


def restore_as(monkeypatch: pytest.MonkeyPatch, directory: Path, iterators: list[Any]) -> None:
    for index, iterator in enumerate(iterators):
        as_process(monkeypatch, index, len(iterators))
        IteratorCheckpointHandler().restore(epath.Path(directory), args.IteratorRestore(iterator))


def indices_of(index: int, count: int) -> ShuffledIndices:
    return ShuffledIndices(NUM_EXAMPLES, 8, seed=3, process_index=index, process_count=count)


def ahead_of_indices(index: int, count: int) -> RunAhead:
    return RunAhead(indices_of(index, count))


@pytest.mark.parametrize("make", [elastic, indices_of, ahead_of_indices], ids=lambda make: make.__name__)
@pytest.mark.parametrize("count", [1, 4])
def test_two_processes_go_on_as_others(
    make: Callable[[int, int], Any], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two processes saved goes on in one or four with the examples that come next, none twice, none left out."""
    expected = [sorted(batch) for batch in drawn(make(0, 1), 5)]
    two = [make(index, 2) for index in range(2)]
    for iterator in two:
        drawn(iterator, 3)
    save_as(monkeypatch, tmp_path, two)
    others = [make(index, count) for index in range(count)]
    restore_as(monkeypatch, tmp_path, others)
    batches = zip(*(drawn(iterator, 2) for iterator in others), strict=True)
    assert [sorted(chain.from_iterable(parts)) for parts in batches] == expected[3:]


def test_who_cannot_divide_anew_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iterator that is bound to its number of processes is an error that says what there is and what to do."""
    save_as(monkeypatch, tmp_path, [map_iterator(), map_iterator()])
    other = map_iterator()
    before = other.get_state()
    with pytest.raises(ValueError, match=r"process 0 of 1.*process_1-of-2.json.*ElasticIterator"):
        restore_as(monkeypatch, tmp_path, [other])
    assert other.get_state() == before


@pytest.mark.parametrize("make", [elastic, indices_of], ids=lambda make: make.__name__)
def test_processes_at_different_positions(
    make: Callable[[int, int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processes that saved were not at the same position, nobody can go on from it in another number."""
    two = [make(0, 2), make(1, 2)]
    next(two[0])
    save_as(monkeypatch, tmp_path, two)
    with pytest.raises(errors.StructureMismatchError, match="position"):
        restore_as(monkeypatch, tmp_path, [make(0, 1)])


def test_a_missing_process_file_is_no_smaller_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files one is missing: an iterator that could divide anew is not given half of the states."""
    save_as(monkeypatch, tmp_path, [indices_of(0, 2), indices_of(1, 2)])
    (tmp_path / "process_1-of-2.json").unlink()
    with pytest.raises(errors.StructureMismatchError, match=r"process_0-of-2\.json"):
        restore_as(monkeypatch, tmp_path, [indices_of(0, 1)])


def test_a_run_divides_anew_too(tmp_path: Path) -> None:
    """`restore` of a run gives an iterator that can divide anew the states of all who saved it."""
    data, expected = elastic(), drawn(elastic(), 5)
    drawn(data, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = ocp.args.StandardSave({"w": jnp.zeros(3)})
        manager.save(3, args=ocp.args.Composite(state=state, data=grain.checkpoint.CheckpointSave(data)))
    saved = tmp_path / "3" / "data" / "process_0-of-1.json"
    for index in range(2):  # as two processes would have left it
        saved.with_name(f"process_{index}-of-2.json").write_bytes(saved.read_bytes())
    saved.unlink()
    resumed, other = elastic(), map_iterator()
    CheckpointManager(tmp_path).restore({"state": {"w": jnp.zeros(3)}}, data=resumed)
    assert drawn(resumed, 2) == expected[3:]
    with pytest.raises(errors.StructureMismatchError, match=r"process_1-of-2\.json"):
        CheckpointManager(tmp_path).restore({"state": {"w": jnp.zeros(3)}}, data=other)


# ------------------------------------------------------------------ our own


def test_indices_are_each_once_in_an_epoch() -> None:
    """An epoch has every index once, but for an incomplete batch, and the next has another order."""
    indices = ShuffledIndices(10, 3, seed=1)
    epochs = [[*chain.from_iterable(drawn(indices, 3))] for _ in range(2)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert indices.position == 6


def test_indices_go_on_from_any_position() -> None:
    """Set at any position, within an epoch or between two, the order goes on as it would have."""
    expected = drawn(ShuffledIndices(10, 3, seed=1), 12)
    walking = ShuffledIndices(10, 3, seed=1)
    for position in range(10):
        other = ShuffledIndices(10, 3, seed=9)
        other.set_state(json.loads(json.dumps(walking.get_state())))
        assert drawn(other, 2) == expected[position : position + 2]
        next(walking)


@pytest.mark.parametrize("other", [ShuffledIndices(11, 3), ShuffledIndices(10, 2)])
def test_indices_of_other_data_are_refused(other: ShuffledIndices) -> None:
    """A position among other examples, or in other batches, is an error and changes nothing."""
    before = other.get_state()
    with pytest.raises(errors.StructureMismatchError, match=r"\(10, 3\)"):
        other.set_state(ShuffledIndices(10, 3).get_state())
    with pytest.raises(errors.StructureMismatchError, match="None"):
        other.set_state({"position": 3})
    assert other.get_state() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "between 1 and all 10"),
        ({"batch_size": 11}, "between 1 and all 10"),
        ({"batch_size": 3, "process_index": 0, "process_count": 2}, "among 2 processes"),
        ({"batch_size": 2, "process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"batch_size": 2, "seed": -1}, "seed"),
    ],
)
def test_indices_that_cannot_be(arguments: dict[str, int], message: str) -> None:
    """Numbers that do not go together are a ValueError that says which."""
    with pytest.raises(ValueError, match=message):
        ShuffledIndices(10, **arguments)


def test_running_ahead_ends_with_its_iterator() -> None:
    """Every element comes once and in order, also the last ones, which nothing is drawn ahead of."""

    class Ten(Iterator[int]):
        def __init__(self) -> None:
            self.position = 0

        def __next__(self) -> int:
            if self.position == 10:
                raise StopIteration
            self.position += 1
            return self.position

        def get_state(self) -> int:
            return self.position

        def set_state(self, state: int) -> None:
            self.position = state

    for num_ahead in (0, 2, 20):
        ahead = RunAhead(Ten(), num_ahead)
        seen = [(element, ahead.get_state()) for element in ahead]
        assert seen == [(n, n) for n in range(1, 11)]
        ahead.set_state(8)
        assert list(ahead) == [9, 10]


def test_running_ahead_draws_ahead() -> None:
    """Elements are drawn, and put, before they are needed: exactly as many as asked for."""
    put: list[Any] = []
    ahead = RunAhead(ShuffledIndices(10, 2), num_ahead=3, put=put.append)
    next(ahead)
    assert len(put) == 4
    next(ahead)
    assert len(put) == 5


def test_running_ahead_of_what_has_no_state() -> None:
    """An iterator without a state is refused at once."""
    with pytest.raises(TypeError, match="get_state"):
        RunAhead(iter([1, 2]))
    with pytest.raises(ValueError, match="num_ahead"):
        RunAhead(ShuffledIndices(4, 2), num_ahead=-1)


def test_an_element_that_could_not_be_put_comes_again() -> None:
    """Where `put` fails, as a device without room does, no element is passed over."""
    calls = count(1)

    def put(element: Any) -> Any:
        if next(calls) in (1, 4, 5):
            raise MemoryError
        return element

    expected = ShuffledIndices(12, 2, seed=0)
    ahead = RunAhead(ShuffledIndices(12, 2, seed=0), num_ahead=1, put=put)
    found: list[Any] = []
    while len(found) < 6:
        try:
            found.append(next(ahead).tolist())
        except MemoryError:
            continue
    assert next(calls) > 9
    assert found == [next(expected).tolist() for _ in range(6)]
