"""What launches of Triton's kernels take of the host in Megatron-Core's layers with experts.

    pip install --no-deps --target FOLDER triton==3.4.0
    git clone --depth 1 --branch v1.2.1 https://github.com/deepseek-ai/DeepEP
    TRITON=FOLDER PYTHONPATH=.:DeepEP python -m reports.host.te_triton \\
        --sources TransformerEngine/transformer_engine SITE_PACKAGES/megatron \\
        --json reports/host/te_triton.json

As te_layers.py measures them, which tells how to install what else it needs: layers whose rows Transformer
Engine's fused permutation moves (moe_permute_fusion), by the alltoall dispatcher and by DeepEP, with its
kernels launched by Triton's own Python and with a stand-in that answers at once, in turn. Triton compiles
them for an H100, and a driver that starts nothing takes the place of the compiled launcher, so that its C
and CUDA's own launch are not in it.
"""

import importlib.util
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from reports.host import te_deepep, te_layers
from reports.host.te_layers import PHASES

ROUNDS, EXPERTS = 50, (4,)


class Driver:
    """Of a device that starts nothing and counts launches."""

    launches = 0
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        get_device_properties=lambda _: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
        },
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Every configuration is as fast."""
        return lambda kernel, **_: (kernel(), [1.0, 1.0, 1.0])[1]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: object) -> None: ...

    def launcher_cls(self, *_: object) -> Any:
        def launch(*_: object) -> None:
            Driver.launches += 1

        return launch


def launched(stand_in: ModuleType) -> ModuleType:
    """The module of these kernels with Triton itself."""
    sys.path.append(os.environ["TRITON"])  # not before: torch would import it
    import triton

    triton.runtime.driver.set_active(Driver())
    spec = importlib.util.spec_from_file_location("launched", stand_in.__file__)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def microbatch(kernels: ModuleType, local: int, model: Any) -> list[float]:
    from transformer_engine.pytorch import permutation

    permutation.triton_permutation = kernels
    return te_deepep.microbatch(local, False, model, model)


def main() -> None:
    te_deepep.install()
    target, core = te_layers.begun(__doc__)
    from transformer_engine.pytorch import permutation

    stand_in = permutation.triton_permutation
    ways = {"stand-in": stand_in, "launched": launched(stand_in)}
    te_layers.spread_experts()
    deepep: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}
    calls: dict[str, te_layers.Call] = {}
    launches: dict[str, float] = {}
    for kind, more in (("alltoall", {}), ("deepep", deepep)):
        for local in EXPERTS:
            model = te_layers.network(local, **more)
            for parameter in model.parameters():
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            for way, kernels in ways.items():
                calls[f"{kind}, {local}, {way}"] = partial(microbatch, kernels, local, model)
            microbatch(ways["launched"], local, model)
            Driver.launches = 0
            microbatch(ways["launched"], local, model)
            launches[f"{kind}, {local}"] = Driver.launches / te_layers.LAYERS
    took = te_layers.timed(calls, ROUNDS)
    every = te_layers.by_phase(took, calls)
    added = {
        name: {
            phase: every[f"{name}, launched"][phase] - every[f"{name}, stand-in"][phase] for phase in PHASES
        }
        for name in launches
    }
    te_layers.written(target, core, took, {"layers": every, "launches": launches, "added": added})


if __name__ == "__main__":
    main()
