"""Adapters from where they were published: the hub, a bucket, or a folder of this machine.

`sources` writes their files into a folder. It checks where they come from, not what they say.
"""
