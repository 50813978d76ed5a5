"""What it takes to lose a checkpoint, or to restore a wrong one: attacks on the library, and on Orbax beside it.

One command a table; each runs the same operations in many processes, strikes, and then looks at what is left::

    python -m attacks.kill     # SIGKILL at every system call that changes the run
    python -m attacks.errors   # EIO, ENOSPC, EDQUOT, EINTR and short writes at every system call

They need ``pip install -e '.[orbax]'``, Linux and a C compiler. A failure of ours is exit code 1.
"""
