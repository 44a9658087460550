"""Sampling: the next token of every row by its own parameters, and the verification of drafts.

The sampler works on a whole batch; adjustments of logits (biases, penalties) are beside it.
"""
