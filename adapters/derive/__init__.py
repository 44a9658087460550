"""New adapters and models out of old ones.

`combine` makes one adapter of several, `merge` a model whose weights contain adapters. `summary`
says in numbers what an adapter does.
"""
