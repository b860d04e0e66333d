"""What the API server last said, object by object. Fed by watch events, and set right by full lists.

A watch that breaks may miss a deletion, and a list may be older than an event that came while it ran. Resource
versions decide: an older word never replaces a newer one. (They are numbers, and comparable: KEP-5504.)

Only the essence of an object is kept. Whole, the pods of a thousand objects would be half a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from resilientllm_operator.actions import Manifest
from resilientllm_operator.names import NAME_LABEL

Key = tuple[str, str, str]
"""kind, namespace (empty for what has none), name"""


class Store:
    def __init__(
        self,
        on_change: Callable[[str, Manifest], None],
        essence: Callable[[str, Manifest], Manifest] = lambda kind, obj: obj,
    ) -> None:
        """``on_change`` is called with the kind and the essence of every object that changed, or went."""
        self._objects: dict[Key, Manifest] = {}
        self._owned: dict[Key, dict[str, Manifest]] = {}
        """By kind, namespace and the ResilientLLM that they are for: objects by their names."""
        self._deleted: dict[Key, int] = {}
        self._on_change = on_change
        self._essence = essence

    def put(self, kind: str, obj: Manifest) -> Key:
        key = _key(kind, obj)
        known = max(_version(self._objects.get(key)), self._deleted.get(key, 0))
        if _version(obj) > known:
            kept = self._essence(kind, obj)
            before = self._drop(key)
            self._objects[key] = kept
            self._owned.setdefault(_owner(key, kept), {})[key[2]] = kept
            self._deleted.pop(key, None)
            if before is None or _content(before) != _content(kept):
                self._on_change(kind, kept)
        return key

    def remove(self, kind: str, obj: Manifest) -> None:
        key = _key(kind, obj)
        if _version(obj) >= _version(self._objects.get(key)):
            self._deleted[key] = _version(obj)
            if (gone := self._drop(key)) is not None:
                self._on_change(kind, gone)

    def replace(self, kind: str, objects: Iterable[Manifest], version: int) -> None:
        """Takes a complete list of one kind, as of ``version``."""
        self.keep_only(kind, {self.put(kind, obj) for obj in objects}, version)

    def keep_only(self, kind: str, listed: Collection[Key], version: int) -> None:
        """After all objects of a kind that were there at ``version`` were put: forgets what was not among them."""
        for key in [key for key in self._objects if key[0] == kind and key not in listed]:
            if _version(self._objects[key]) <= version and (gone := self._drop(key)) is not None:
                self._on_change(kind, gone)
        self._deleted = {key: at for key, at in self._deleted.items() if key[0] != kind or at > version}

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        return self._objects.get((kind, namespace, name))

    def all(self, kind: str) -> Iterator[Manifest]:
        return iter([obj for key, obj in self._objects.items() if key[0] == kind])

    def of(self, kind: str, namespace: str, name: str) -> list[Manifest]:
        """The objects of a kind that are labelled with the name of a ResilientLLM."""
        return list(self._owned.get((kind, namespace, name), {}).values())

    def _drop(self, key: Key) -> Manifest | None:
        gone = self._objects.pop(key, None)
        if gone is not None:
            owner = _owner(key, gone)
            del self._owned[owner][key[2]]
            if not self._owned[owner]:
                del self._owned[owner]
        return gone


def _owner(key: Key, obj: Manifest) -> Key:
    return key[0], key[1], obj["metadata"].get("labels", {}).get(NAME_LABEL, "")


def _key(kind: str, obj: Manifest) -> Key:
    return kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _content(obj: Manifest) -> Manifest:
    """All but the version: much that is written to an object is not in its essence."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    return {**obj, "metadata": metadata}


def _version(obj: Manifest | None) -> int:
    metadata: dict[str, Any] = obj["metadata"] if obj else {}
    return int(metadata.get("resourceVersion", 0))
