"""The `longspan` command: one file per verb, each of which imports PyTorch only once it runs."""
