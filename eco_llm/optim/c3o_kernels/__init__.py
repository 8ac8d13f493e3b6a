"""C3O's Triton kernels, launched by `c3o_triton`: those of `plan` and `passes`; the other modules are their parts."""
