"""`python -m surgery` is `surgery`."""

from surgery.cli import main

main(prog_name="surgery")
