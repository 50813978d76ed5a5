"""What users test their own loops and handlers with."""

from ckpt_hooks.testing import zoo
from ckpt_hooks.testing.comparing import assert_same, differences

__all__ = ["assert_same", "differences", "zoo"]
