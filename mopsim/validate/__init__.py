"""Predicted against measured: published runs and components, simulated, calibrated out of sample, scored."""
