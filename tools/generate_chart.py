"""Writes the templates of the Helm chart from the manifests that Kustomize uses: one source, two packages.

    python tools/generate_chart.py

Comments and order stay as they are. What a value of the chart can change is replaced here, piece by piece; a piece that
is not found exactly once ends it, so that a manifest and its template do not drift apart unseen. Written by hand are
``Chart.yaml``, ``values.yaml``, ``values.schema.json``, ``_helpers.tpl`` and ``NOTES.txt``.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
MANIFESTS = REPOSITORY / "manifests"
TEMPLATES = MANIFESTS / "helm" / "resilientllm" / "templates"
SYSTEM = "namespace: resilientllm-system"
RELEASE = "namespace: {{ $.Release.Namespace }}"


@dataclass(frozen=True)
class Piece:
    """One replacement, of what is there exactly once."""

    old: str
    new: str


@dataclass(frozen=True)
class Template:
    """One document of a template. ``only_if``: the condition under which it is rendered at all."""

    pieces: Sequence[Piece] = ()
    only_if: str | None = None
    wave: int | None = -1
    namespaced: bool = True


def after(line: str, *lines: str) -> Piece:
    return Piece(f"{line}\n", "\n".join((line, *lines)) + "\n")


def option(value: str, field: str, indent: int) -> tuple[str, ...]:
    """A field that is there only if the value says something."""
    space = " " * indent
    return (
        f"{space}{{{{- with .Values.{value} }}}}",
        f"{space}{field}: {{{{ toJson . }}}}",
        f"{space}{{{{- end }}}}",
    )


_BOUND = '{{ ternary "RoleBinding" "ClusterRoleBinding" (ne .Values.watchNamespace "") }}'
_MAY_WATCH_ALL = Template(
    [
        Piece("kind: ClusterRoleBinding", f"kind: {_BOUND}"),
        after("metadata:\n  name: resilientllm-operator", *option("watchNamespace", "namespace", 2)),
        Piece(SYSTEM, RELEASE),
    ],
    namespaced=False,
)
_NODES = "{{- if .Values.nodes.watch }}"
_DEPLOYMENT = Template(
    [
        Piece("  replicas: 2\n", "  replicas: {{ .Values.replicas }}\n"),
        Piece(
            "        app.kubernetes.io/part-of: resilientllm\n    spec:\n",
            "        app.kubernetes.io/part-of: resilientllm\n"
            "        {{- with .Values.podLabels }}\n"
            "        {{- toYaml . | nindent 8 }}\n"
            "        {{- end }}\n" + "\n".join(option("podAnnotations", "annotations", 6)) + "\n    spec:\n",
        ),
        after(
            "      serviceAccountName: resilientllm-operator",
            *option("imagePullSecrets", "imagePullSecrets", 6),
            *option("priorityClassName", "priorityClassName", 6),
            *option("nodeSelector", "nodeSelector", 6),
            *option("affinity", "affinity", 6),
        ),
        Piece(
            "tolerationSeconds: 30}\n      containers:\n",
            "tolerationSeconds: 30}\n"
            "        {{- with .Values.tolerations }}\n"
            "        {{- toYaml . | nindent 8 }}\n"
            "        {{- end }}\n"
            "      containers:\n",
        ),
        Piece("image: resilientllm/operator:dev", 'image: {{ include "resilientllm.image" . | quote }}'),
        Piece("imagePullPolicy: IfNotPresent", "imagePullPolicy: {{ .Values.image.pullPolicy }}"),
        after(
            "          command: [resilientllm-operator]",
            '          {{- with include "resilientllm.arguments" . | fromJsonArray }}',
            "          args: {{ toJson . }}",
            "          {{- end }}",
        ),
        Piece(
            "resources:\n            requests: {cpu: 20m, memory: 96Mi}\n            limits: {memory: 512Mi}\n",
            "resources: {{ toJson .Values.resources }}\n",
        ),
    ]
)
_API_SERVER = Piece(
    "        - {port: 443, protocol: TCP}\n        - {port: 6443, protocol: TCP}\n",
    "        {{- range .Values.networkPolicies.apiServerPorts }}\n"
    "        - {port: {{ . }}, protocol: TCP}\n"
    "        {{- end }}\n",
)
_MODELS = Template([Piece("metadata:\n", "metadata:\n  namespace: {{ . }}\n")], wave=None, namespaced=False)
_KEEP = (
    "  {{- if or .Values.crds.keep .Values.argocd.syncWaves }}",
    "  annotations:",
    "    {{- if .Values.crds.keep }}",
    "    argocd.argoproj.io/sync-options: Prune=false,Delete=false",
    "    helm.sh/resource-policy: keep",
    "    {{- end }}",
    "    {{- if .Values.argocd.syncWaves }}",
    '    argocd.argoproj.io/sync-wave: "-2"',
    "    {{- end }}",
    "  {{- end }}",
)

_PROMETHEUS = "{{- if .Values.monitoring.prometheus }}"
_ALERTS = "components/prometheus/rules.yaml"
_BOARDS = "grafana/kustomization.yaml"


def _monitor(wave: int | None) -> Template:
    return Template([Piece(SYSTEM, RELEASE)], only_if=_PROMETHEUS, wave=wave, namespaced=False)


def _runbooks() -> Iterator[Piece]:
    """Each alert's page, below the folder that the value names."""
    for page in re.findall(r"runbook_url: docs(/\S+)\n", (MANIFESTS / _ALERTS).read_text()):
        docs = '{{ trimSuffix "/" $.Values.monitoring.docs }}'
        yield Piece(f"runbook_url: docs{page}\n", f"runbook_url: {docs}{page}\n")


CRD = "../crds/resilientllm.dev_resilientllms.yaml"
CHART: Mapping[str, Mapping[str, Template]] = {
    CRD: {
        "CustomResourceDefinition/resilientllms.resilientllm.dev": Template(
            [after("metadata:\n  name: resilientllms.resilientllm.dev", *_KEEP)],
            only_if="{{- if .Values.crds.enabled }}",
            wave=None,
            namespaced=False,
        )
    },
    "base/rbac.yaml": {
        "ServiceAccount/resilientllm-operator": Template(),
        "ClusterRole/resilientllm-operator": Template(namespaced=False),
        "ClusterRoleBinding/resilientllm-operator": _MAY_WATCH_ALL,
        "ClusterRole/resilientllm-operator-nodes": Template(only_if=_NODES, namespaced=False),
        "ClusterRoleBinding/resilientllm-operator-nodes": Template(
            [Piece(SYSTEM, RELEASE)], only_if=_NODES, namespaced=False
        ),
        "Role/resilientllm-operator-lease": Template(),
        "RoleBinding/resilientllm-operator-lease": Template([Piece(SYSTEM, RELEASE)]),
    },
    "base/operator.yaml": {
        "Deployment/resilientllm-operator": _DEPLOYMENT,
        "PodDisruptionBudget/resilientllm-operator": Template(only_if="{{- if gt (int .Values.replicas) 1 }}"),
    },
    "components/network-policies/operator.yaml": {
        "NetworkPolicy/resilientllm-operator": Template(
            [Piece(f"  {SYSTEM}\n", ""), _API_SERVER], only_if="{{- if .Values.networkPolicies.operator }}"
        ),
    },
    "overlays/models/network-policies.yaml": {
        "NetworkPolicy/resilientllm-engines": Template(
            [
                *_MODELS.pieces,
                Piece(
                    "kubernetes.io/metadata.name: resilientllm-system",
                    "kubernetes.io/metadata.name: {{ $.Release.Namespace }}",
                ),
            ],
            only_if="{{- range .Values.networkPolicies.modelNamespaces }}",
            wave=None,
            namespaced=False,
        ),
        "NetworkPolicy/resilientllm-stages": Template(
            _MODELS.pieces,
            only_if="{{- range .Values.networkPolicies.modelNamespaces }}",
            wave=None,
            namespaced=False,
        ),
    },
    "components/prometheus/podmonitors.yaml": {
        "PodMonitor/resilientllm-operator": _monitor(-1),
        "PodMonitor/resilientllm-engines": _monitor(None),
        "PodMonitor/resilientllm-stages": _monitor(None),
    },
    _ALERTS: {
        "PrometheusRule/resilientllm": Template(
            [Piece(SYSTEM, RELEASE), *_runbooks()], only_if=_PROMETHEUS, wave=None, namespaced=False
        ),
    },
}
FILES = {
    CRD: "crd.yaml",
    "base/rbac.yaml": "rbac.yaml",
    "base/operator.yaml": "operator.yaml",
    "components/network-policies/operator.yaml": "network-policy.yaml",
    "overlays/models/network-policies.yaml": "models-network-policies.yaml",
    "components/prometheus/podmonitors.yaml": "podmonitors.yaml",
    _ALERTS: "alerts.yaml",
}


def templates() -> Iterator[tuple[str, str]]:
    """File name and text of each generated template."""
    for source, documents in CHART.items():
        yield FILES[source], _template(source, documents)
    yield "boards.yaml", _boards()


def _template(source: str, documents: Mapping[str, Template]) -> str:
    text = _verbatim((MANIFESTS / source).read_text())
    found = {_name(part): part.strip("\n") + "\n" for part in re.split(r"^---\n", text, flags=re.MULTILINE)}
    if found.keys() != documents.keys():
        raise SystemExit(
            f"{source}: expected {sorted(documents)}, found {sorted(found)}; say in CHART what becomes of the others"
        )
    return _header(source) + "".join(_document(f"{source}: {key}", found[key], how) for key, how in documents.items())


def _boards() -> str:
    """ConfigMaps as Kustomize's generator makes them."""
    kustomization = yaml.safe_load((MANIFESTS / _BOARDS).read_text())
    options = kustomization["generatorOptions"]
    text = "{{- if .Values.monitoring.grafana }}\n"
    for each in kustomization["configMapGenerator"]:
        metadata = {"name": each["name"], "labels": options["labels"], "annotations": options["annotations"]}
        head = yaml.safe_dump({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, sort_keys=False)
        text += "---\n" + head.replace("metadata:\n", f"metadata:\n  {RELEASE}\n") + "data:\n"
        for key, _, file in (entry.partition("=") for entry in each["files"]):
            board = _verbatim((MANIFESTS / "grafana" / file).read_text())
            text += f"  {key}: |\n" + textwrap.indent(board, "    ")
    return _header(_BOARDS) + text + "{{- end }}\n"


def _verbatim(text: str) -> str:
    """For what Helm would take for its own, though it is Prometheus' or Grafana's."""
    return text.replace("{{", '{{ "{{" }}')


def _header(source: str) -> str:
    name = (MANIFESTS / source).resolve().relative_to(REPOSITORY)
    return f"{{{{- /* Generated from {name} by `make generate`. Do not edit. */ -}}}}\n"


def _document(where: str, text: str, how: Template) -> str:
    name = re.search(r"^metadata:\n  name: .*$", text, re.MULTILINE)
    assert name is not None, f"{where}: metadata does not begin with the name"
    pieces = list(how.pieces)
    if how.namespaced:
        pieces.append(after(name[0], f"  {RELEASE}"))
    if how.wave is not None:
        wave = f'    argocd.argoproj.io/sync-wave: "{how.wave}"'
        condition = "  {{- if .Values.argocd.syncWaves }}"
        pieces.append(after(name[0], condition, "  annotations:", wave, "  {{- end }}"))
    for piece in pieces:
        if (times := text.count(piece.old)) != 1:
            raise SystemExit(f"{where}: expected {piece.old!r} once, found it {times} times")
        text = text.replace(piece.old, piece.new)
    if how.only_if is None:
        return f"---\n{text}"
    return f"{how.only_if}\n---\n{text}{{{{- end }}}}\n"


def _name(document: str) -> str:
    kind = re.search(r"^kind: (.*)$", document, re.MULTILINE)
    name = re.search(r"^  name: (.*)$", document, re.MULTILINE)
    assert kind is not None and name is not None, document
    return f"{kind[1]}/{name[1]}"


def main() -> int:
    TEMPLATES.mkdir(parents=True, exist_ok=True)
    for name, text in templates():
        (TEMPLATES / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
