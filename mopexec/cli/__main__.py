"""`python -m mopexec.cli`."""

from mopexec.cli import main

if __name__ == "__main__":
    main()
