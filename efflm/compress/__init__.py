"""Steps from a model to a model, and recipes that chain them.

`efflm.compress` is two things: this package, and the function of efflm.api with that name. Python binds a package to
its name in the package above as soon as anything imports it, so the package itself can be called.
"""

import sys
import types
from typing import Any

import efflm


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        """See efflm.api.compress."""
        return efflm.__getattr__("compress")(*args, **settings)


sys.modules[__name__].__class__ = _Callable
