"""The `flat_units` runtime: MoP as an explicit schedule of operators over flat parameter units."""
