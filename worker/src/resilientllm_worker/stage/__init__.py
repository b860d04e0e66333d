"""One stage of the pipeline: weights, one KV tensor, and the tenants that it serves. Decides nothing."""
