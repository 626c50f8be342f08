"""The schedule of models and strategies that mopexec does not run: drawn from the layers' tapes."""
