"""What the API server last said, object by object. Fed by watch events, and set right by full lists.

A watch that breaks may miss a deletion, and a list may be older than an event that came while it ran. Resource
versions decide: an older word never replaces a newer one. (They are numbers, and comparable: KEP-5504.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from resilientllm_operator.actions import Manifest

Key = tuple[str, str, str]
"""kind, namespace (empty for what has none), name"""


class Store:
    def __init__(self, on_change: Callable[[str, Manifest], None]) -> None:
        """``on_change`` is called with the kind and the object, for every one that changed, or went."""
        self._objects: dict[Key, Manifest] = {}
        self._deleted: dict[Key, int] = {}
        self._on_change = on_change

    def put(self, kind: str, obj: Manifest) -> None:
        key = _key(kind, obj)
        known = max(_version(self._objects.get(key)), self._deleted.get(key, 0))
        if _version(obj) > known:
            self._objects[key] = obj
            self._deleted.pop(key, None)
            self._on_change(kind, obj)

    def remove(self, kind: str, obj: Manifest) -> None:
        key = _key(kind, obj)
        if _version(obj) >= _version(self._objects.get(key)):
            self._deleted[key] = _version(obj)
            if self._objects.pop(key, None) is not None:
                self._on_change(kind, obj)

    def replace(self, kind: str, objects: Iterable[Manifest], version: int) -> None:
        """Takes a complete list of one kind, as of ``version``."""
        listed = {_key(kind, obj): obj for obj in objects}
        for obj in listed.values():
            self.put(kind, obj)
        for key in [key for key in self._objects if key[0] == kind and key not in listed]:
            if _version(self._objects[key]) <= version:
                self._on_change(kind, self._objects.pop(key))
        self._deleted = {key: at for key, at in self._deleted.items() if key[0] != kind or at > version}

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        return self._objects.get((kind, namespace, name))

    def all(self, kind: str) -> Iterator[Manifest]:
        return iter([obj for key, obj in self._objects.items() if key[0] == kind])

    def labelled(self, kind: str, namespace: str, label: str, value: str) -> list[Manifest]:
        return [
            obj
            for key, obj in self._objects.items()
            if key[:2] == (kind, namespace) and obj["metadata"].get("labels", {}).get(label) == value
        ]


def _key(kind: str, obj: Manifest) -> Key:
    return kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _version(obj: Manifest | None) -> int:
    metadata: dict[str, Any] = obj["metadata"] if obj else {}
    return int(metadata.get("resourceVersion", 0))
