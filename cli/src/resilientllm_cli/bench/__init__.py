"""`resilientllm bench`: what a killed stage costs the clients, and what the executor costs without a kill."""
