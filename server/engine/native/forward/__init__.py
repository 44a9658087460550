"""Forwards: runners that compute the logits of a step, flat or padded.

A flat forward may be traced, compiled or captured as CUDA graphs; each is compared with the model.
"""
