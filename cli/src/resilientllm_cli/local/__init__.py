"""Local mode: the stages and engines of a ResilientLLM as processes of one machine, from the same plan."""

from resilientllm_cli.local.cluster import ClusterFailed, LocalCluster, local_cluster
from resilientllm_cli.local.layout import Layout

__all__ = ["ClusterFailed", "Layout", "LocalCluster", "local_cluster"]
