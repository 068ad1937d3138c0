"""Launching under real schedulers: a Slurm of one node, set up by the tests, and a stand-in for PBS before it."""
