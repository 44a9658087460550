"""The tokenizers and chat templates that adapters bring, each read in a limited process.

`vocabulary` is what others call; the sandbox runs what strangers wrote.
"""
