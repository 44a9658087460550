"""PEFT's files and what they mean: config and weights become named vectors, and back.

Here are PEFT's defaults and its matching of modules, and every check that an upload must pass.
"""
