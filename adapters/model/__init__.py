"""IA3 on a model: the layers that rescale, and the bank of all vectors on the device.

`slots` is what a server calls, `model` what a notebook calls.
"""
