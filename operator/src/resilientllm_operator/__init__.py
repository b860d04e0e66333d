"""The operator: observe, decide, dispatch, verify."""
