"""Durable revisions of adapters, in a folder on disk or in a bucket.

`store` is what others call. It writes through a `Storage`: `folder` or `bucket`.
"""
