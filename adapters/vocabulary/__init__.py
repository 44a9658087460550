"""Reads the tokenizers and chat templates that adapters bring, in processes with limits.

`vocabulary` is the interface; it runs what strangers wrote through `sandbox`.
"""
