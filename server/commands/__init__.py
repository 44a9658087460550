"""The commands of `infuse`, a file for each group."""
