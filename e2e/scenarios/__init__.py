"""Scenarios on a real cluster: one behaviour a file, each with a fault that is shown to have landed, a time bound, and
streams that are compared token by token with an undisturbed run."""
