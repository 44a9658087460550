"""The base model: loading, quantisation, and faster modules in place of transformers' own.

Linear layers are packed, RMS norms fused, and Mamba 2's time steps clamped.
"""
