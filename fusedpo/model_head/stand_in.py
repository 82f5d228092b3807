"""Running something else in place of a module's forward, for one thread at a time."""

from __future__ import annotations

import threading
from typing import Any


class _StandIn:
    """The forward of a head that some threads have do something else, and its last hook."""

    lock = threading.Lock()  # for what stands in a module's dict

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name
        self.own = vars(module).get(name)  # None: its class's forward
        self.calls = 0  # of all threads
        self.own_call = threading.local()  # .last: forward and hook of this thread's
        setattr(module, name, self)
        self.handle = module.register_forward_hook(self.hook)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward, _ = getattr(self.own_call, "last", (self.forward, None))
        return forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the head does."""
        # not a bound method that is kept: torch.compile would look it up anew, and find this
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def hook(self, module: Any, args: Any, output: Any) -> None:
        """What comes out of the head's call, after the hooks of others."""
        _, hook = getattr(self.own_call, "last", (None, None))
        if hook is not None:
            hook(output)

    def remove(self) -> None:
        self.handle.remove()
        if self.own is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.own)
