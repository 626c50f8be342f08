"""`python -m mopexec`."""

from mopexec.cli import main

main()
