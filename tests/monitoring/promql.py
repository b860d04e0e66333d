"""What an expression asks for: the series and the labels that it names. For lints; promtool judges the syntax."""

from __future__ import annotations

import re

from tools.metrics_reference import series

TARGET_LABELS = frozenset({"namespace", "name", "pod", "job", "instance"})
"""What scraping adds, by the PodMonitors."""
OTHERS = {
    "up": frozenset[str](),
    "vllm:num_requests_running": frozenset({"model_name", "engine"}),
    "vllm:num_requests_waiting": frozenset({"model_name", "engine"}),
    "namespace_name:resilientllm_available:max": frozenset[str](),
}
"""Series that are not ours, or recorded."""

_SELECTOR = re.compile(r"\b(up|(?:resilientllm_|vllm:|namespace_name:)[\w:]+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def asked_for(expression: str) -> dict[str, set[str]]:
    """Every series that is named, with the labels that it is chosen by."""
    found: dict[str, set[str]] = {}
    for name, labels in _SELECTOR.findall(expression):
        found.setdefault(name, set()).update(_LABEL.findall(re.sub(r'"[^"]*"', '""', labels)))
    return found


def grouped_by(expression: str) -> set[str]:
    return {label.strip() for labels in _GROUPING.findall(expression) for label in labels.split(",") if label.strip()}


def mistakes(expression: str) -> list[str]:
    """Names of series and labels that do not exist."""
    known = series() | OTHERS
    asked = asked_for(expression)
    found = [f"no such series: {name}" for name in asked if name not in known]
    if not asked:
        found.append("it asks for nothing")
    for name, labels in asked.items():
        wrong = labels - known.get(name, frozenset()) - TARGET_LABELS
        found += [f"{name} has no label {label}" for label in sorted(wrong)]
    labels_of_all = TARGET_LABELS.union(*(known.get(name, frozenset()) for name in asked))
    found += [f"nothing has the label {label}" for label in sorted(grouped_by(expression) - labels_of_all)]
    return found
