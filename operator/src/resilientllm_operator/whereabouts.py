"""Which objects have pods on which node, so that an event of a node wakes only those that it concerns."""

from __future__ import annotations

from resilientllm_operator.actions import Manifest
from resilientllm_operator.names import NAME_LABEL

Name = tuple[str, str]
"""namespace, name"""


class Whereabouts:
    def __init__(self) -> None:
        self._node_of: dict[Name, str] = {}
        self._pods_on: dict[str, dict[Name, Name]] = {}
        """By node: the pods there, and the object that each is of."""

    def put(self, pod: Manifest) -> None:
        """A pod as it is now. It keeps its node; but the next pod of its name may get another."""
        self.remove(pod)
        name, node = _name(pod), pod.get("spec", {}).get("nodeName")
        owner = pod["metadata"].get("labels", {}).get(NAME_LABEL)
        if node and owner:
            self._node_of[name] = node
            self._pods_on.setdefault(node, {})[name] = (name[0], owner)

    def remove(self, pod: Manifest) -> None:
        node = self._node_of.pop(_name(pod), None)
        if node is not None:
            self._pods_on[node].pop(_name(pod))
            if not self._pods_on[node]:
                del self._pods_on[node]

    def objects_on(self, node: str) -> set[Name]:
        """Namespaces and names of the objects with a pod on that node."""
        return set(self._pods_on.get(node, {}).values())


def _name(pod: Manifest) -> Name:
    return pod["metadata"]["namespace"], pod["metadata"]["name"]
