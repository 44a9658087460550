"""Scheduling: which waiting sequences are admitted, and which tokens of each row a step computes.

A fair queue, a scheduler that admits and preempts, the prefix cache, and speculation's budget.
"""
