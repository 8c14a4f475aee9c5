"""`python -m ttt_cache.cli`: what `ttt-cache` is, for launchers that start modules."""

from . import main

main(prog_name="ttt-cache")
