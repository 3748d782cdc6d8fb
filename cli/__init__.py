"""The command line, installed as ``merge_cli``: it formats plans, progress and errors, no more."""
