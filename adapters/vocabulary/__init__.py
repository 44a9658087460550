"""Reads the tokenizers and chat templates that adapters bring, in processes with limits.

`vocabulary` is the interface; it reads them through `sandbox`.
"""
