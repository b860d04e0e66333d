"""Builds the pods of stages and engines. Pure; everything here meets Pod Security ``restricted``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from resilientllm_api.crd import (
    API_VERSION,
    HOSTNAME,
    KIND,
    EnvVar,
    PodTemplate,
    RecoveryPolicy,
    ResilientLLMSpec,
    WeightsSource,
)
from resilientllm_api.durations import parse_seconds
from resilientllm_api.ports import (
    ENGINE_API_PORT,
    ENGINE_CONTROL_PORT,
    HEALTH_PATH,
    READY_PATH,
    STAGE_HEALTH_PORT,
    STAGE_PORT,
)

from resilientllm_operator.actions import Manifest
from resilientllm_operator.names import (
    INSTANCE_LABEL,
    NAME_LABEL,
    ROLE_LABEL,
    SPEC_HASH_ANNOTATION,
    STAGE_LABEL,
    Role,
    Slot,
    pod_name,
    slot_labels,
    token_secret_name,
)
from resilientllm_operator.world import ObjectView

USER_ID = 65532
TOKEN_FOLDER = "/etc/resilientllm/token"
TOKEN_KEY = "token"
STATE_FOLDER = "/var/run/resilientllm"
"""An emptyDir: the engine's plan outlives its container there."""

NODE_LOSS_TOLERATION_SECONDS = 30
"""How long a pod stays bound to a node that does not answer. Donors serve meanwhile, so there is no hurry to
load weights elsewhere because of a short break; Kubernetes' own five minutes would be capacity lost for nothing."""

_SIBLINGS_WEIGHT = 1
"""Of the wish that the stages of one instance be apart, where that for other failure domains counts 100. The scheduler
adds the weight for every pod that is in the way, and an instance has up to 63 other stages."""

END_SECONDS = 15
"""What a process gets to end in, after it has given away or finished its work. The kubelet counts both together, from
SIGTERM on, and kills what is left."""

_WRITABLE = "/scratch"
"""Not /tmp: a volume there would hide what an image, or a development machine's mounts, have below it."""
_DEFAULT_ENV = {
    # No passwd entry exists for the user id, and no home: libraries ask for both and write caches.
    "TMPDIR": _WRITABLE,
    "HOME": f"{_WRITABLE}/home",
    "USER": "resilientllm",
    "LOGNAME": "resilientllm",
    "XDG_CACHE_HOME": f"{_WRITABLE}/cache",
    "VLLM_CACHE_ROOT": f"{_WRITABLE}/cache/vllm",
    "HF_HOME": f"{_WRITABLE}/cache/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": f"{_WRITABLE}/cache/inductor",
    "TRITON_CACHE_DIR": f"{_WRITABLE}/cache/triton",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}


def owner_references(name: str, uid: str) -> list[Manifest]:
    """Makes the garbage collector delete what the operator made, when the object goes. No finalizer is needed."""
    return [{"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": uid, "controller": True}]


def build_pod(obj: ObjectView, slot: Slot, predecessors: Iterable[str] = (), twins: Sequence[str] = ()) -> Manifest:
    """The pod for a slot. ``predecessors`` are the uids of the pods there that are on their way out.

    ``twins`` are where a stage may get its weights. They are no part of the spec: others do not make a pod outdated.
    """
    spec = _pod_spec(obj, slot)
    if twins:
        spec["containers"][0]["command"].append(f"--weights-from={','.join(twins)}")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(obj.name, obj.uid, slot, predecessors),
            "namespace": obj.namespace,
            "labels": slot_labels(obj.name, slot),
            "annotations": {SPEC_HASH_ANNOTATION: spec_hash(obj, slot)},
            "ownerReferences": owner_references(obj.name, obj.uid),
        },
        "spec": spec,
    }


def spec_hash(obj: ObjectView, slot: Slot) -> str:
    """Names what a pod is made from. A pod that carries another one was made from an older spec.

    What it has of ``spec.recovery`` does not count: no pod is replaced for another grace period.
    """
    known = obj.spec_hashes.get(slot)
    if known is None:
        essential = replace(obj, spec=obj.spec.model_copy(update={"recovery": RecoveryPolicy()}))
        text = json.dumps(_pod_spec(essential, slot), sort_keys=True)
        known = obj.spec_hashes[slot] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return known


def served_name(obj: ObjectView) -> str:
    return obj.spec.model.served_name or obj.name


def _pod_spec(obj: ObjectView, slot: Slot) -> Manifest:
    spec = obj.spec
    template = spec.engine if slot.role is Role.ENGINE else spec.stage
    pod: Manifest = {
        "restartPolicy": "Always",  # A killed process is started again in place; its address stays.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _drain_seconds(spec) + END_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "affinity": {"podAntiAffinity": _anti_affinity(obj, slot)},
        "tolerations": [
            *(each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in template.tolerations),
            *(
                {
                    "key": f"node.kubernetes.io/{trouble}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": NODE_LOSS_TOLERATION_SECONDS,
                }
                for trouble in ("not-ready", "unreachable")
            ),
        ],
        "containers": [_container(obj, slot, template)],
        "volumes": _volumes(obj, slot),
    }
    # What is not asked for is left out, and not empty: another pod would be another hash, and a roll-out.
    asked = {
        "nodeSelector": dict(template.node_selector or {}),
        "runtimeClassName": template.runtime_class_name,
        "priorityClassName": template.priority_class_name,
        "imagePullSecrets": [each.model_dump(mode="json") for each in spec.image_pull_secrets],
    }
    return pod | {field: value for field, value in asked.items() if value}


def _container(obj: ObjectView, slot: Slot, template: PodTemplate) -> Manifest:
    engine = slot.role is Role.ENGINE
    return {
        "name": str(slot.role),
        "image": obj.spec.image,
        "imagePullPolicy": str(obj.spec.image_pull_policy),
        "command": _engine_command(obj, slot) if engine else _stage_command(obj, slot),
        "env": _env(obj.spec, template),
        "ports": [
            {"name": name, "containerPort": port, "protocol": "TCP"}
            for name, port in (
                (("http", ENGINE_API_PORT), ("control", ENGINE_CONTROL_PORT))
                if engine
                else (("stage", STAGE_PORT), ("health", STAGE_HEALTH_PORT))
            )
        ],
        "resources": template.resources.model_dump(mode="json", exclude_none=True),
        "volumeMounts": _volume_mounts(obj, slot),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        # The last line of a process that gives up becomes part of the pod's status, where the operator reads it.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **(_engine_probes() if engine else _stage_probes()),
    }


def _stage_command(obj: ObjectView, slot: Slot) -> list[str]:
    return [
        "resilientllm-stage",
        _model(obj.spec),
        f"--instance={slot.instance}",
        f"--stage={slot.stage}",
        f"--listen=0.0.0.0:{STAGE_PORT}",
        f"--health=0.0.0.0:{STAGE_HEALTH_PORT}",
        f"--token-file={TOKEN_FOLDER}/{TOKEN_KEY}",
        f"--pool-fraction={obj.spec.replication.pool_percent / 100}",
        f"--leave-timeout={_drain_seconds(obj.spec)}",
        *(["--lend-weights"] if obj.spec.recovery.weights is WeightsSource.TWIN else []),
        *_parallelism(obj.spec),
        *obj.spec.args,
    ]


def _engine_command(obj: ObjectView, slot: Slot) -> list[str]:
    return [
        "resilientllm-engine",
        _model(obj.spec),
        f"--instance={slot.instance}",
        f"--plan-file={STATE_FOLDER}/plan.json",
        f"--control=0.0.0.0:{ENGINE_CONTROL_PORT}",
        f"--token-file={TOKEN_FOLDER}/{TOKEN_KEY}",
        "--host=0.0.0.0",
        f"--port={ENGINE_API_PORT}",
        f"--served-model-name={served_name(obj)}",
        f"--shutdown-timeout={_drain_seconds(obj.spec)}",
        *_parallelism(obj.spec),
        *obj.spec.args,
    ]


def _drain_seconds(spec: ResilientLLMSpec) -> int:
    return math.ceil(parse_seconds(spec.recovery.drain_timeout))


def _model(spec: ResilientLLMSpec) -> str:
    model = spec.model.path or spec.model.name
    assert model is not None, "the API server admits no model without path and name"
    return model


def _parallelism(spec: ResilientLLMSpec) -> list[str]:
    return [f"--pipeline-parallel-size={spec.stages}", f"--tensor-parallel-size={spec.tensor_parallel_size}"]


def _env(spec: ResilientLLMSpec, template: PodTemplate) -> list[Manifest]:
    """Ours, then the spec's, then the template's: the later wins."""
    env: dict[str, Manifest] = {name: {"name": name, "value": value} for name, value in _DEFAULT_ENV.items()}
    if spec.model.path is not None:
        env["HF_HUB_OFFLINE"] = {"name": "HF_HUB_OFFLINE", "value": "1"}
    for variable in (*spec.env, *template.env):
        env[variable.name] = _env_var(variable)
    return list(env.values())


def _env_var(variable: EnvVar) -> Manifest:
    return variable.model_dump(mode="json", by_alias=True, exclude_none=True)


def _volumes(obj: ObjectView, slot: Slot) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "token", "secret": {"secretName": token_secret_name(obj.name), "defaultMode": 0o440}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    if slot.role is Role.ENGINE:
        volumes.append({"name": "state", "emptyDir": {}})
    if obj.spec.model.volume is not None:
        claim = obj.spec.model.volume.persistent_volume_claim.claim_name
        volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    return volumes


def _volume_mounts(obj: ObjectView, slot: Slot) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": _WRITABLE},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if slot.role is Role.ENGINE:
        mounts.append({"name": "state", "mountPath": STATE_FOLDER})
    if obj.spec.model.volume is not None:
        mounts.append({"name": "model", "mountPath": obj.spec.model.volume.mount_path, "readOnly": True})
    return mounts


def _stage_probes() -> Manifest:
    return {
        # Loading weights takes from seconds to many minutes; the health server answers from the beginning.
        "startupProbe": _http_probe(STAGE_HEALTH_PORT, HEALTH_PATH, period=2, failures=300),
        "readinessProbe": _http_probe(STAGE_HEALTH_PORT, READY_PATH, period=2, failures=2),
        # A stage that hangs is replaced by a donor within seconds, by its engine; this only cleans up. It cannot give
        # anything away in order any more, and where no donor is left its instance waits for it to start again.
        "livenessProbe": _http_probe(STAGE_HEALTH_PORT, HEALTH_PATH, period=5, failures=12)
        | {"terminationGracePeriodSeconds": END_SECONDS},
    }


def _engine_probes() -> Manifest:
    return {
        "startupProbe": _http_probe(ENGINE_CONTROL_PORT, HEALTH_PATH, period=2, failures=300),
        "readinessProbe": _http_probe(ENGINE_API_PORT, "/health", period=2, failures=2),
        "livenessProbe": _http_probe(ENGINE_CONTROL_PORT, HEALTH_PATH, period=5, failures=12),
    }


def _http_probe(port: int, path: str, *, period: int, failures: int) -> Manifest:
    return {
        "httpGet": {"port": port, "path": path},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _anti_affinity(obj: ObjectView, slot: Slot) -> Manifest:
    """The copies of a stage never share a node, or one loss would take stage and donor together.

    All else is preferred, because few nodes must not mean no service: other failure domains for the copies of a stage,
    so that three instances run in two zones (pairs are then chosen across them); nodes apart for the stages of one
    instance, and for engines.
    """
    domain = obj.spec.replication.topology_key
    ours = {NAME_LABEL: obj.name, ROLE_LABEL: str(slot.role)}
    if slot.stage is None:
        return {"preferredDuringSchedulingIgnoredDuringExecution": [_prefer(domain, ours)]}
    copies = ours | {STAGE_LABEL: str(slot.stage)}
    siblings = ours | {INSTANCE_LABEL: str(slot.instance)}
    # With hostname the same as ever: another rule would be another pod, and every pod be replaced for it.
    return {
        "requiredDuringSchedulingIgnoredDuringExecution": [_term(HOSTNAME, copies)],
        "preferredDuringSchedulingIgnoredDuringExecution": (
            [_prefer(HOSTNAME, siblings)]
            if domain == HOSTNAME
            else [_prefer(domain, copies), _prefer(HOSTNAME, siblings, weight=_SIBLINGS_WEIGHT)]
        ),
    }


def _term(domain: str, labels: dict[str, str]) -> Manifest:
    return {"topologyKey": domain, "labelSelector": {"matchLabels": labels}}


def _prefer(domain: str, labels: dict[str, str], weight: int = 100) -> Manifest:
    return {"weight": weight, "podAffinityTerm": _term(domain, labels)}
