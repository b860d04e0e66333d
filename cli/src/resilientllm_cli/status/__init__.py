"""How instances and stages stand, as a picture in the terminal: of objects in a cluster, or of a local run."""
