"""What each command of mopexec does, imported when it is called."""
