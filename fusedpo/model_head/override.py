"""Overriding a module's forward for one thread, while all others run the original."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class ForwardOverride:
    """A module's forward that calls the override of the thread it runs in, if there is one."""

    lock = threading.Lock()  # guards the modules' __dict__ and `users`

    def __init__(self, module: Any, attribute: str) -> None:
        self.module, self.attribute = module, attribute
        self.original = vars(module).get(attribute)  # None: the forward of its class
        self.users = 0  # overrides in force, of all threads
        self.thread = threading.local()  # .override: this thread's forward and hook
        setattr(module, attribute, self)
        self.handle = module.register_forward_hook(self.hook)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward, _ = getattr(self.thread, "override", (self.forward, None))
        return forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward."""
        # not a bound method that is kept: torch.compile would look it up anew, and find this
        if self.original is not None:
            return self.original(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def hook(self, module: Any, args: Any, output: Any) -> None:
        """Pass the output of the module's call, after its other hooks, to this thread's hook."""
        _, hook = getattr(self.thread, "override", (None, None))
        if hook is not None:
            hook(output)

    def remove(self) -> None:
        """Restore the module."""
        self.handle.remove()
        if self.original is None:
            delattr(self.module, self.attribute)
        else:
            setattr(self.module, self.attribute, self.original)


def original_forward(forward: Any) -> Any:
    """The forward that makes logits: below an override and below lazy logits, or the one passed
    in."""
    if isinstance(forward, ForwardOverride):
        lazy = hasattr(forward.original, "plain")
        return forward.original.plain if lazy else forward.forward
    return getattr(forward, "plain", forward)


def is_override_hook(hook: Any) -> bool:
    """Whether a forward hook is one that an override has registered."""
    return isinstance(getattr(hook, "__self__", None), ForwardOverride)


@contextmanager
def override_forward(
    module: Any, attribute: str, forward: Callable[..., Any], hook: Callable[[Any], None]
) -> Iterator[None]:
    """Run another forward in place of a module's, in this thread, within the context.

    Args:
        module: the module.
        attribute: the name under which its call finds the forward.
        forward: what to run; called with the arguments of the module's call.
        hook: called with the output of the module's call, after all of its own hooks.
    """
    with ForwardOverride.lock:
        override = vars(module).get(attribute)
        if not isinstance(override, ForwardOverride):
            override = ForwardOverride(module, attribute)
        override.users += 1
    # one that is in force in this thread already is resumed afterwards
    outer = getattr(override.thread, "override", None)
    override.thread.override = (forward, hook)
    try:
        yield
    finally:
        if outer is None:
            del override.thread.override
        else:
            override.thread.override = outer
        with ForwardOverride.lock:
            override.users -= 1
            if not override.users:
                override.remove()
