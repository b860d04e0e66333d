"""The store believes the newer word, wherever it comes from."""

from __future__ import annotations

from typing import Any

import pytest
from resilientllm_operator.names import NAME_LABEL
from resilientllm_operator.store import Store


@pytest.fixture
def changes() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def store(changes: list[tuple[str, str]]) -> Store:
    return Store(lambda kind, obj: changes.append((kind, obj["metadata"]["resourceVersion"])))


def pod(version: int, name: str = "a", phase: str | None = None, **labels: str) -> dict[str, Any]:
    metadata = {"namespace": "n", "name": name, "resourceVersion": str(version), "labels": labels}
    return {"metadata": metadata, "status": {"phase": phase or version}}


def version(store: Store, name: str = "a") -> str | None:
    found = store.get("Pod", "n", name)
    return found["metadata"]["resourceVersion"] if found else None


def test_a_newer_event_replaces_an_older_one(store: Store, changes: list[tuple[str, str]]) -> None:
    for number in (5, 7, 6, 7):
        store.put("Pod", pod(number))
    assert version(store) == "7"
    assert changes == [("Pod", "5"), ("Pod", "7")]


def test_a_version_without_a_change_is_kept_and_not_told(store: Store, changes: list[tuple[str, str]]) -> None:
    store.put("Pod", pod(5, phase="Running"))
    store.put("Pod", pod(6, phase="Running"))
    assert (version(store), changes) == ("6", [("Pod", "5")])


def test_a_list_removes_what_a_broken_watch_missed(store: Store) -> None:
    store.put("Pod", pod(5))
    store.replace("Pod", [], version=9)
    assert version(store) is None


def test_a_list_does_not_remove_what_came_after_it(store: Store) -> None:
    store.put("Pod", pod(12))
    store.replace("Pod", [], version=9)
    assert version(store) == "12"


def test_a_list_does_not_bring_back_what_was_deleted_after_it(store: Store) -> None:
    store.put("Pod", pod(5))
    store.remove("Pod", pod(12))
    store.replace("Pod", [pod(5)], version=9)
    assert version(store) is None


def test_a_late_deletion_of_an_earlier_object_does_not_remove_its_namesake(store: Store) -> None:
    store.put("Pod", pod(20))
    store.remove("Pod", pod(12))
    assert version(store) == "20"


def test_a_list_of_one_kind_leaves_the_others(store: Store) -> None:
    store.put("Pod", pod(5))
    store.replace("Service", [], version=9)
    assert version(store) == "5"


def names(store: Store, owner: str) -> list[str]:
    return [each["metadata"]["name"] for each in store.of("Pod", "n", owner)]


def test_finds_by_the_object_that_they_are_for(store: Store) -> None:
    store.put("Pod", pod(5, "a", **{NAME_LABEL: "x"}))
    store.put("Pod", pod(6, "b", **{NAME_LABEL: "y"}))
    assert (names(store, "y"), names(store, "z")) == (["b"], [])
    store.put("Pod", pod(7, "b", **{NAME_LABEL: "x"}))
    assert (names(store, "x"), names(store, "y")) == (["a", "b"], [])
    store.remove("Pod", pod(8, "a"))
    assert names(store, "x") == ["b"]
    store.replace("Pod", [], version=9)
    assert names(store, "x") == []


def test_keeps_the_essence_and_tells_it(changes: list[tuple[str, str]]) -> None:
    told: list[dict[str, Any]] = []
    store = Store(lambda _, obj: told.append(obj), lambda _, obj: {"metadata": obj["metadata"]})
    store.put("Pod", pod(5) | {"spec": {"a": "long one"}})
    assert told == [store.get("Pod", "n", "a")] == [{"metadata": pod(5)["metadata"]}]
