"""The `flat_units` runtime: MoP as an explicit schedule over flat parameter units."""
