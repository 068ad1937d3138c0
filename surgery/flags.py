"""The flag that every command has which writes weights.

Only click is imported, as for everything that `surgery --help` shows.
"""

from __future__ import annotations

import click

no_sync = click.option(
    "--no-sync",
    is_flag=True,
    help="Do not wait until the disk has the output: sooner done; after a power cut it may be spoilt.",
)
