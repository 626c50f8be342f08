"""Weights in Hugging Face's format: which tensor of a file holds which parameter, in and out."""
