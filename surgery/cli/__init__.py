"""The command line: `main.py`, and a file per command; imports everything, and nothing imports it."""
