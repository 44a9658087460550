"""Infuse's own engine: continuous batching over one base model with an adapter for each row.

`EngineCore` runs steps and `Engine` gives it a thread. Each folder is a part of a step.
"""
