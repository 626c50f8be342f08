"""What `import mopsim` offers, and what the commands call."""
