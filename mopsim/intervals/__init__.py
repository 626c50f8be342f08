"""How far a prediction may be off: distributions of measured over predicted, from published runs."""
