"""Constraints: grammars that answers must match, and the masks that enforce them.

Sources are vetted in a process of their own, compiled by llguidance, and kept.
"""
