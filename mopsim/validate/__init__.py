"""Predicted against measured: cases of runs -> simulations -> scores. Rows of a table become cases first."""
