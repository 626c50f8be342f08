"""The commands of mopsim, one module each: read inputs, call the library, show a table, write JSON."""
