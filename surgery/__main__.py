"""`python -m surgery` is `surgery`."""

from surgery.cli.main import main

main(prog_name="surgery")
