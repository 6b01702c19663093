"""The commands of `ijepa`: `options.py` says what each accepts, and each has a file that runs it."""
