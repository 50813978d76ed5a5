"""How fast the library is, beside Orbax, safetensors, flax's msgpack and the disk itself.

One command a table, and `python -m benchmarks` for all of them. Each compares everybody in one process (in a process
each where they restore, and the last one in every process of a group), in alternating rounds, on the same bytes::

    python -m benchmarks.save           # to durable
    python -m benchmarks.restore        # into jax.Array, page cache warm
    python -m benchmarks.blocking       # what an asynchronous save takes from the training loop
    python -m benchmarks.interference   # a training loop while a save runs behind it
    python -m benchmarks.hook           # a call of the hook with nothing due
    python -m benchmarks.growth         # time against leaves, bytes and kept checkpoints
    python -m benchmarks.scale          # a model of 1 to 10,000 processes, from costs measured here
    python -m benchmarks.processes      # one state, saved and restored by several processes

They need ``pip install -e '.[orbax,bench]'``. All take ``--rounds``, ``--workloads``, ``--scale``, ``--directory``,
``--json``, ``--plot`` and ``--tiny``.
"""
