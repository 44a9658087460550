"""KV caches: keys and values of running rows and of cached prefixes, within a budget of tokens.

Strips on the CPU, pages on CUDA, groups for models that run padded, and the planning of sizes.
"""
