"""Native kernels for CPUs: C++ that is called through jax.ffi and runs on XLA's own threads.

build: compiling and loading. dot: matmuls with laid-out weights. src/: the C++.
"""
