"""Several engines' requests in one model runner: whose request, whose block. Works on `protocol` structs only."""
