"""The names that are installed: `infuse.adapters` and `infuse.server` are the folders beside this.

docs/decisions/0054-names-that-are-installed.md says why the two are links.
"""
