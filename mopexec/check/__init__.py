"""Checks of a plan: the dry run, verification against one device, the longest context that trains."""
