"""A Triton backend named `cpu` for machines where kernels are only ever interpreted."""
