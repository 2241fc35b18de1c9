"""Ray as far as npd uses it, in this process: an actor's method is done when it is called, and what goes there is pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    cause: BaseException | None = None


class RayTaskError(RayError):
    """An exception of Python in an actor."""


class ActorDiedError(RayError):
    pass


class ActorUnavailableError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class ObjectStoreFullError(RayError):
    pass


class OutOfDiskError(RayError):
    pass


class FakeRay:
    """Stands for the module `ray`, where a cluster is joined that has one node.

    Args:
        fails: is given each method's name and argument, and returns what becomes of the actor instead; None: nothing.
    """

    __version__ = "2.60.0"
    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=RayTaskError,
        ActorDiedError=ActorDiedError,
        ActorUnavailableError=ActorUnavailableError,
        OutOfMemoryError=OutOfMemoryError,
        ObjectStoreFullError=ObjectStoreFullError,
        OutOfDiskError=OutOfDiskError,
    )

    def __init__(self, fails: Callable[[str, Any], RayError | None] = lambda method, argument: None) -> None:
        self.fails = fails
        self.objects: list[bytes | RayError] = []
        self.begun = 0

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "node", "Alive": True, "Resources": {"CPU": 1.0}}]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "node")

    def put(self, value: Any) -> int:
        self.objects.append(pickle.dumps(value))
        return len(self.objects) - 1

    def get(self, reference: int) -> Any:
        found = self.objects[reference]
        if isinstance(found, RayError):
            raise found
        return pickle.loads(found)

    def wait(self, references: list[int], num_returns: int = 1, timeout: float = 0) -> tuple[list[int], list[int]]:
        return references[:num_returns], references[num_returns:]

    def kill(self, handle: Any) -> None: ...

    def remote(self, kind: type) -> Any:
        def begin(*arguments: Any) -> _Handle:
            self.begun += 1
            return _Handle(self, kind(*pickle.loads(pickle.dumps(arguments))))

        return _Remote(begin)


class _Remote:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: Any) -> _Remote:
        return self


class _Handle:
    def __init__(self, ray: FakeRay, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def __getattr__(self, method: str) -> _Remote:
        def call(*arguments: Any) -> int:
            try:
                failed = self._ray.fails(method, arguments[0] if arguments else None)
                if failed is None:
                    answer = getattr(self._actor, method)(*pickle.loads(pickle.dumps(arguments)))
                    return self._ray.put(answer)
            except Exception as error:
                failed = RayTaskError(f"Traceback (most recent call last):\n  ...\n{type(error).__name__}: {error}")
            self._ray.objects.append(failed)
            return len(self._ray.objects) - 1

        return _Remote(call)
