"""Hardware profiles from kernel curves: `python -m mopsim.fit_profiles` makes hardware_profiles/*.yaml.

tables -> matmul, collectives, attention (fits) -> assemble (datasheet numbers + fits -> profile).
"""
