"""Kernels in C++, which a server that may compile builds at its start, for its own processor."""
