"""`python -m mopsim`."""

from mopsim.cli import main

main()
