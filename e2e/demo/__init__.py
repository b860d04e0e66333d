"""The main job, for real: a Kubernetes, two pipelines, one kill -9, and streams that do not notice."""
