"""Hardware profiles from measured kernels: `python -m hardware_profiles.data.fit` writes the YAML files.

tables -> matmul, collectives, attention (fits) -> assemble (datasheet numbers + fits -> profile).
"""
