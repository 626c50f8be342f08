"""Attention under autograd (mopexec.model.transformer, mopexec.modules.sequence)."""

from mopsim.layers.attention import attention
from mopsim.lowering.fsdp.block import FsdpBlock
from mopsim.lowering.workload import Work

_A = "attention"


class FsdpAttention(FsdpBlock):
    """The attention half of a layer."""

    def _attention_works(self, layer: int, backward: bool, *names: str) -> list[Work]:
        key = f"attention {self.c.model.window(layer)}"
        if key not in self._tapes:
            self.kernels(key, attention(self.c.model, self.c.shapes, layer))
        return [work for name in names for work in self.b.works(self._tapes[key][name], backward)]

    def _attention_forward(self, layer: int, phase: str, graph: bool) -> None:
        b, c = self.b, self.c
        works = self._attention_works(layer, False, "q_proj", "k_proj", "v_proj")
        b.make("q", self.q)
        b.make("k", self.kv)
        b.make("v", self.kv)
        if c.model.qk_norm == "head":
            for name, size in (("q", self.q), ("k", self.kv)):
                b.rename(name, f"{name}raw")
                self._norm_forward(layer, f"{name}norm", size, size // c.b * c.wide, name, phase, graph, _A)
                self._keep(layer, graph and not self.cast, f"{name}raw", f"{name}raw")
        for name, size in (("q", self.q), ("k", self.kv)):
            b.spike(2 * size)
            b.make(f"{name}r", size)
            works.append(Work("memory_bound", bytes=9.0 * size, launches=7))
        b.compute("projections", _A, phase, layer, works)
        core = {"qr": self.q, "kr": self.kv, "v": self.kv}
        if self.D > 1:
            core = self._trade_in(layer, phase)
        b.make("o", self.q)
        b.make("sums", self.lse)
        if self.repeats > 1:
            b.spike(2 * self.q // self.repeats)
        b.compute("attention_core", _A, phase, layer, self._attention_works(layer, False, "attention_core"))
        b.drop(*(name for name in ("q", "k") if name in b.alive))
        for name in core:
            self._keep(layer, graph, name, name)
        for name in {"qr", "kr", "v", "k_spread", "v_spread"} & set(b.alive):
            b.drop(name)
        self._keep(layer, graph, "sums", "sums")
        self._trade_out(layer, phase, graph)
        b.make("a", self.u)
        b.compute("o_proj", _A, phase, layer, self._attention_works(layer, False, "o_proj"))
        self._keep(layer, graph, "merged" if self.D > 1 else "o", "merged")
        self._keep(layer, graph, "h", "h1")

    def _trade_in(self, layer: int, phase: str) -> dict[str, int]:
        """Ulysses: q, k, v for whole sequences and this rank's heads."""
        b = self.b
        if self.kv_whole > self.kv:
            b.make("k_spread", self.kv_whole)
            b.make("v_spread", self.kv_whole)
        found = {"q_whole": self.q, "k_whole": self.kv_whole, "v_whole": self.kv_whole}
        for name, size in found.items():
            self._trade(name, size, layer, phase)
        return found

    def _trade(self, name: str, size: int, layer: int, phase: str) -> None:
        """Stacked, sent, put together: two copies on the way."""
        b = self.b
        b.make("stacked", size)
        b.make("traded", size)
        b.compute("stack", _A, phase, layer, [Work("memory_bound", bytes=2.0 * size)])
        op = b.issue("sequence exchange", "all_to_all", size, "sequence", _A, phase, layer)
        b.drop("stacked")
        b.make(name, size)
        b.compute("put together", _A, phase, layer, [Work("memory_bound", bytes=2.0 * size)], op)
        b.drop("traded")

    def _trade_out(self, layer: int, phase: str, graph: bool) -> None:
        if self.D > 1:
            self._trade("merged", self.q, layer, phase)
            self._keep(layer, graph, "o", "o")

    def _attention_backward(self, layer: int) -> None:
        """The gradient of `a` (the caller's) becomes `dh`."""
        b = self.b
        kernel = self._attention_works(layer, True, "o_proj")
        b.make("do", self.q)
        b.compute("o_proj", _A, "backward", layer, kernel)
        b.drop(f"merged.{layer}") if self.D > 1 else None
        if self.D > 1:
            self._trade("do_whole", self.q, layer, "backward")
            b.drop("do")
        grads = {"dq": self.q, "dk": self.kv_whole, "dv": self.kv_whole}
        for name, size in grads.items():
            b.make(name, size)
        if self.repeats > 1:
            b.spike(self.q // self.repeats + 2 * self.kv_whole)
        b.compute(
            "attention_core", _A, "backward", layer, self._attention_works(layer, True, "attention_core")
        )
        whole = ("q_whole", "k_whole", "v_whole", "o") if self.D > 1 else ("qr", "kr", "v", "merged")
        b.drop("do_whole" if self.D > 1 else "do", *(f"{name}.{layer}" for name in (*whole, "sums")))
        if self.D > 1:
            for name, size in grads.items():
                self._trade(f"{name}_local", size, layer, "backward")
                b.drop(name)
                b.rename(f"{name}_local", name)
            if self.kv_whole > self.kv:
                for name in ("dk", "dv"):
                    b.rename(name, "wide_grad")
                    b.make(name, self.kv)
                    b.compute(
                        "sum copies", _A, "backward", layer, [Work("memory_bound", bytes=2.0 * self.kv_whole)]
                    )
                    b.drop("wide_grad")
        works = []
        for size in (self.kv, self.q):
            b.spike(2.5 * size)
            works.append(Work("memory_bound", bytes=14.0 * size, launches=9))
        b.compute("rotate", _A, "backward", layer, works)
        if self.c.model.qk_norm == "head":
            for name, size in (("k", self.kv), ("q", self.q)):
                self._norm_backward(layer, f"{name}norm", size, size // self.c.b * self.c.wide, _A)
                if not self.cast:
                    b.drop(f"{name}raw.{layer}")
        b.make("dh", self.u)
        b.spike(2 * self.u)
        works = self._attention_works(layer, True, "v_proj", "k_proj", "q_proj")
        works.append(Work("memory_bound", bytes=6.0 * self.u, launches=2))
        b.drop("dq", "dk", "dv")
        b.compute("projections", _A, "backward", layer, works)
        b.drop(f"h1.{layer}")
