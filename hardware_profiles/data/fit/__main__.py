"""`python -m hardware_profiles.data.fit`: fit, print the residuals, write the profiles."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mopsim.common.errors import MopError
from mopsim.common.io import to_yaml, write_text

DATA = Path(__file__).parents[1]
HEADER = (
    "# Made by `python -m hardware_profiles.data.fit` from hardware_profiles/data: "
    "change those, not this file.\n"
)


def main(
    gemm: Annotated[Path, typer.Option(help="bf16 product latencies by shape (CSV)")] = DATA
    / "gemm_bf16.csv.gz",
    nccl: Annotated[Path, typer.Option(help="NCCL latencies inside a node (CSV)")] = DATA
    / "nccl_single_node.csv.gz",
    vtrain: Annotated[Path, typer.Option(help="all-reduce times to check the A100 fit against (CSV)")] = DATA
    / "nccl_all_reduce_vtrain.csv",
    components: Annotated[
        Path, typer.Option(help="attention, grouped-matmul and best-matmul rates (CSV)")
    ] = DATA / "components.csv",
    machines: Annotated[Path, typer.Option(help="datasheet numbers (YAML)")] = DATA / "machines.yaml",
    out: Annotated[Path, typer.Option(help="folder for the profiles")] = DATA.parent,
) -> None:
    """Fit the hardware profiles' curves to measured kernel timings; write one YAML for each machine type."""
    from hardware_profiles.data.fit.collectives import check_against_vtrain
    from hardware_profiles.data.fit.run import Fitter
    from hardware_profiles.data.fit.tables import read_csv

    fitter = Fitter(gemm, nccl, components, machines)
    profiles = fitter.profiles()
    rows = read_csv(vtrain, ("gpu", "n_gpus", "size_bytes", "time_s"))
    check = check_against_vtrain(rows, fitter.node("a100_sxm")["all_reduce"])
    for profile in profiles:
        write_text(out / f"{profile.name}.yaml", HEADER + to_yaml(profile))
    for name, text in sorted(fitter.report.items()):
        print(f"{name}: {text}")
    print(f"all_reduce a100_sxm on vTrain's A100 (not fitted): {check}")
    print(f"wrote {len(profiles)} profiles to {out}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except MopError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
