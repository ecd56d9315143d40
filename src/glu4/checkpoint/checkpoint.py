"""An open NVFP4 checkpoint, whatever its format: what it holds, and its matrices, read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from glu4.checkpoint.common import CheckpointFormat, Config, Names, Oddity, Scheme
from glu4.checkpoint.files import TensorFiles
from glu4.checkpoint.gated import GatedSite, find_gated
from glu4.checkpoint.modules import Modules
from glu4.checkpoint.stack import Stack, stack_plain
from glu4.errors import CheckpointError, UnsupportedError
from glu4.nvfp4 import NibbleOrder, NVFP4Tensor, ScaleSign, _choice
from glu4.weights import GatedWeights

__all__ = ["Checkpoint"]

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class _Pair(NamedTuple):
    """Gate and up of one expert or one dense MLP, both [N, K], with what they share and their biases [N]."""

    gate: NVFP4Tensor
    up: NVFP4Tensor
    input_scale: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None


class Checkpoint:
    """A compressed-tensors or ModelOpt checkpoint. Built by `open_checkpoint`; usable as a context manager.

    format     "compressed-tensors" or "modelopt"
    config     the model's config.json as a dict, {} when there is none
    oddities   what opening and loading have found worth telling so far, one `Oddity` each

    Methods that load raise CheckpointError for missing or damaged tensors and UnsupportedError, naming the scheme, for
    modules whose arithmetic glu4 does not compute.
    """

    def __init__(
        self,
        files: TensorFiles,
        format: CheckpointFormat,
        names: Names,
        configuration: Config | None,
        config: dict[str, Any],
        *,
        nibble_order: NibbleOrder = "low_first",
        scale_sign: ScaleSign = "reject",
    ) -> None:
        _choice("nibble_order", nibble_order, get_args(NibbleOrder))
        _choice("scale_sign", scale_sign, get_args(ScaleSign))
        self.format = format
        self.names = names
        self.config = config
        self.path = files.path
        self._files = files
        self._nibble_order = nibble_order
        self._scale_sign = scale_sign
        self._oddities: dict[Oddity, None] = {}
        self.modules = Modules(files, names, configuration, self._note)
        self._sites = find_gated(self.modules.layers, frozenset(self.modules.parts))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Drop the file handles; tensors already loaded stay valid."""
        self._files.close()

    def __repr__(self) -> str:
        found = f"layers={len(self.modules.layers)}, gated={len(self._sites)}"
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, {found})"

    # ---- what is there ----

    @property
    def oddities(self) -> tuple[Oddity, ...]:
        return tuple(self._oddities)

    def tensor_names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._files)

    def plain_names(self) -> list[str]:
        """Names of the tensors that `load_plain` gives: all but the parts of NVFP4 matrices."""
        parts = {f"{module}.{part}" for module in self.modules.layers for part in self.names.all}
        return [name for name in self._files if name not in parts]

    def layers(self) -> list[str]:
        """Modules that hold NVFP4 weights, refused ones included: `scheme_of` says which can be loaded."""
        return list(self.modules.layers)

    def gated_mlps(self) -> list[str]:
        """Prefixes that `load_gated` takes: dense gated MLPs ("model.layers.0.mlp") and stacks ("...mlp.experts")."""
        return list(self._sites)

    def gated_site(self, prefix: str) -> GatedSite:
        """Where the projections of a gated MLP are; raises CheckpointError when `prefix` names none."""
        for name in (prefix, f"{prefix}.experts"):
            if name in self._sites:
                return self._sites[name]
        stack, _, last = prefix.rpartition(".")
        site = self._sites.get(stack)
        if site is not None and site.experts is not None and last.isdecimal() and int(last) in site.experts:
            return GatedSite(prefix, site.gate, site.up)
        near = [p for p in self._sites if prefix in p][:3] or list(self._sites)[:3]
        known = f"; known are {', '.join(near)}" if near else "; the checkpoint holds none"
        raise CheckpointError(f"{self.path}: no NVFP4 gated MLP at {prefix!r}{known}")

    def scheme_of(self, module: str) -> Scheme:
        """How a module is quantised; raises CheckpointError when no tensor belongs to it."""
        return self.modules.scheme_of(module)

    # ---- loading ----

    def load_plain(self, name: str) -> Tensor:
        """A tensor that is no part of an NVFP4 matrix, as stored."""
        module, _, part = name.rpartition(".")
        if module in self.modules.layers and part in self.names.all:
            raise CheckpointError(f"{name} is part of an NVFP4 matrix; load_matrix({module!r}) reads it")
        return self._files.load(name)

    def load_matrix(self, name: str) -> tuple[NVFP4Tensor, Tensor | None]:
        """(matrix [N, K], input scale) of one module; the input scale is a multiplier, float32 `[]`, or None.

        None means that activations are quantised dynamically, or not at all (`scheme_of(name).activations`), or that
        the stored scale is unusable, which is reported in `oddities`.
        """
        if name not in self.modules.layers:
            held = f", which is {self.scheme_of(name).name}" if name in self.modules.parts else ""
            raise CheckpointError(f"{self.path}: no NVFP4 matrix at {name!r}{held}; `glu4 inspect` lists them")
        scheme = self.scheme_of(name)
        if not scheme.supported:
            raise UnsupportedError(f"{name}: scheme {scheme.name} is not supported: {scheme.reason}")
        codes, block_scale = (self._load_part(name, part) for part in (self.names.codes, self.names.block_scale))
        g = self._global_scale(name, codes, block_scale)
        try:
            matrix = NVFP4Tensor.from_packed(
                codes, block_scale, g, nibble_order=self._nibble_order, scale_sign=self._scale_sign
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self._files.file_of(f'{name}.{self.names.codes}')}, module {name}: {error}") from error
        if matrix.ndim != 2 or matrix.is_swizzled:
            raise CheckpointError(
                f"{self._files.file_of(f'{name}.{self.names.codes}')}, module {name}: expected codes [N, K/2] and linear block "
                f"scales [N, K/16], found {list(codes.shape)} and {list(block_scale.shape)}"
            )
        return matrix, self._input_scale(name, scheme)

    def load_gated(self, prefix: str, experts: Iterable[int] | None = None) -> GatedWeights:
        """Gate and up of one gated MLP, `[N, K]`, or of a stack of experts, `[E, N, K]`.

        prefix   of `gated_mlps()`; "...mlp" also finds "...mlp.experts", and "...experts.7" is one expert as a dense MLP
        experts  indices to load, in that order, for one shard of expert parallelism; by default all of them

        Gate and up are fed the same activations, so they share one input scale: the larger of two. A stack in which
        only some experts have an input scale is dynamic as a whole: a scale borrowed from other experts could clip what
        this one is fed, a dynamic one never does.
        """
        site = self.gated_site(prefix)
        if site.experts is None:
            if experts is not None:
                raise ValueError(f"experts: {prefix} is a dense MLP; leave experts out")
            return GatedWeights(*self._load_pair(site, None))
        chosen = self._choose_experts(site, experts)
        return self._load_stack(site, chosen)

    # ---- parts of a matrix ----

    def _load_part(self, module: str, part: str) -> Tensor:
        name = f"{module}.{part}"
        if name not in self._files:
            present = ", ".join(sorted(self.modules.parts.get(module, ()))) or "nothing"
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing (the module holds {present}); the export or the download is incomplete"
            )
        return self._files.load(name)

    def _scalar(self, module: str, part: str) -> Tensor:
        value = self._load_part(module, part)
        if value.dtype != torch.float32 or value.numel() != 1:
            raise CheckpointError(
                f"{self._files.file_of(f'{module}.{part}')}, tensor {module}.{part}: expected one float32 value, got "
                f"{value.dtype} of shape {list(value.shape)}; the export is damaged"
            )
        return value.reshape(())

    def _global_scale(self, module: str, codes: Tensor, block_scale: Tensor) -> Tensor:
        """The multiplier. compressed-tensors gives an all-zero matrix a NaN or infinite divisor (2688 / 0) and
        then writes 1.0; where a file kept the former, any value is exact, and 1.0 is taken. It is an error on others."""
        stored = self._scalar(module, self.names.global_scale)
        name = f"{module}.{self.names.global_scale}"
        if self.names.divisors and not bool(torch.isfinite(stored)) and _is_zero(codes, block_scale):
            self._note(module, f"{self.names.global_scale} is {float(stored)} on an all-zero matrix; read as 1.0")
            return torch.ones(())
        g = 1.0 / stored if self.names.divisors else stored
        if not bool(torch.isfinite(stored) & torch.isfinite(g) & (g > 0)):
            kind = "divisor" if self.names.divisors else "multiplier"
            raise CheckpointError(
                f"{self._files.file_of(name)}, tensor {name}: expected a positive finite {kind}, found {float(stored)}; "
                "export the layer again"
            )
        return g.clone()

    def _input_scale(self, module: str, scheme: Scheme) -> Tensor | None:
        part = self.names.input_scale
        if f"{module}.{part}" not in self._files:
            if scheme.activations == "static":
                self._note(
                    module, f"{part} is missing although the configuration says static; activations are quantised dynamically"
                )
            return None
        stored = self._scalar(module, part)
        if scheme.activations != "static":
            self._note(
                module, f"{part} is stored although the configuration says activations are {scheme.activations}; not used"
            )
            return None
        scale = 1.0 / stored if self.names.divisors else stored.clone()
        if not bool(torch.isfinite(stored) & torch.isfinite(scale) & (scale > 0)):
            self._note(module, f"{part} is {float(stored)}, never calibrated; activations are quantised dynamically")
            return None
        return scale

    # ---- gated MLPs ----

    def _load_pair(self, site: GatedSite, expert: int | None) -> _Pair:
        gate_name, up_name = site.modules(expert)
        if up_name is None:
            return self._load_fused(gate_name)
        gate, gate_scale = self.load_matrix(gate_name)
        up, up_scale = self.load_matrix(up_name)
        if gate.shape != up.shape:
            raise CheckpointError(
                f"{self.path}: {gate_name} is {list(gate.shape)} and {up_name} is {list(up.shape)}; gate and up "
                "must have one shape"
            )
        scale = self._shared_input_scale(gate_name, up_name, gate_scale, up_scale)
        return _Pair(gate, up, scale, self._bias(gate_name, gate.rows), self._bias(up_name, up.rows))

    def _load_fused(self, name: str) -> _Pair:
        if self.config.get("model_type") == "gpt_oss":
            raise UnsupportedError(f"{name}: gpt_oss interleaves gate and up rows; split them into gate_proj and up_proj first")
        both, scale = self.load_matrix(name)
        if both.rows % 2:
            raise CheckpointError(f"{self.path}: {name} has {both.rows} rows; gate rows then up rows make an even number")
        n = both.rows // 2
        bias = self._bias(name, both.rows)
        biases = (None, None) if bias is None else (bias[:n], bias[n:])
        return _Pair(both.narrow_rows(0, n), both.narrow_rows(n, n), scale, *biases)

    def _bias(self, module: str, rows: int) -> Tensor | None:
        name = f"{module}.bias"
        if name not in self._files:
            return None
        bias = self._files.load(name)
        if tuple(bias.shape) != (rows,) or bias.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise CheckpointError(
                f"{self._files.file_of(name)}, tensor {name}: expected a float bias of shape [{rows}], got {bias.dtype} "
                f"of shape {list(bias.shape)}"
            )
        return bias

    def _shared_input_scale(self, gate: str, up: str, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            if a is not None or b is not None:
                self._note(gate, f"one input scale for this and {up}, which are fed the same activations: it serves both")
            return a if b is None else b
        if not torch.equal(a, b):
            self._note(gate, f"input scale {float(a):.6g}, {up.rpartition('.')[2]} {float(b):.6g}; the larger serves both")
        return torch.maximum(a, b)

    def _choose_experts(self, site: GatedSite, experts: Iterable[int] | None) -> list[int]:
        present = site.experts or ()
        if experts is not None:
            chosen = [int(e) for e in experts]
            absent = sorted(set(chosen) - set(present))
            if absent or not chosen:
                what = f"experts {_ranges(absent)} are not there" if absent else "no expert is asked for"
                raise CheckpointError(f"{self.path}: {site.prefix}: {what}; it holds {_ranges(present)}")
            return chosen
        missing = self.missing_experts(site)
        if missing:
            raise CheckpointError(
                f"{self.path}: {site.prefix} lacks experts {_ranges(missing)} (it holds {_ranges(present)}); download the "
                "missing shards, or name those wanted with experts="
            )
        return list(present)

    def missing_experts(self, site: GatedSite) -> tuple[int, ...]:
        """Gaps in the indices of a stack, and those missing at its end by the expert count in config.json."""
        if site.experts is None:
            return ()
        count = max(site.experts[-1] + 1, self._configured_experts() or 0)
        return tuple(sorted(set(range(count)) - set(site.experts)))

    def _configured_experts(self) -> int | None:
        for document in (self.config, self.config.get("text_config")):
            if isinstance(document, dict):
                for key in _EXPERT_COUNTS:
                    if type(document.get(key)) is int and 0 < document[key] < 10**6:
                        return int(document[key])
        return None

    def _pairs(self, site: GatedSite, chosen: list[int]) -> Iterator[_Pair]:
        """The experts of a stack, one at a time; raises CheckpointError where they differ in shape."""
        shape = None
        for e in chosen:
            pair = self._load_pair(site, e)
            shape = shape or pair.gate.shape
            if pair.gate.shape != shape:
                raise CheckpointError(
                    f"{self.path}: {site.prefix}.{e} is {list(pair.gate.shape)}, expert {chosen[0]} is {list(shape)}; experts "
                    "of one stack must have one shape"
                )
            yield pair

    def _load_stack(self, site: GatedSite, chosen: list[int]) -> GatedWeights:
        gate, up = Stack(len(chosen)), Stack(len(chosen))
        scales: list[Tensor | None] = []
        biases: tuple[list[Tensor | None], list[Tensor | None]] = ([], [])
        for pair in self._pairs(site, chosen):
            gate.add(pair.gate)
            up.add(pair.up)
            scales.append(pair.input_scale)
            biases[0].append(pair.gate_bias)
            biases[1].append(pair.up_bias)
        return GatedWeights(
            gate.matrices(),
            up.matrices(),
            self._stack_input_scale(site, chosen, scales),
            self._stack_bias(site, "gate", biases[0]),
            self._stack_bias(site, "up", biases[1]),
        )

    def load_down(self, prefix: str, experts: Iterable[int] | None = None) -> tuple[NVFP4Tensor | Tensor, Tensor | None]:
        """(down projection `[E, K, N]`, input scale `[E]` or None) of a stack of experts that `load_gated` takes.

        NVFP4, or a plain tensor where the checkpoint keeps it unquantised. One expert is read at a time, as in `load_gated`.
        """
        site = self.gated_site(prefix)
        if site.experts is None:
            raise CheckpointError(f"{self.path}: {prefix} is a dense MLP; load_matrix reads its {site.down}")
        chosen = self._choose_experts(site, experts)
        names = [f"{site.prefix}.{e}.{site.down}" for e in chosen]
        if not any(name in self.modules.layers for name in names):
            return stack_plain(lambda name: self.load_plain(f"{name}.weight"), names), None
        stack = Stack(len(chosen))
        scales: list[Tensor | None] = []
        for name in names:
            matrix, scale = self.load_matrix(name)
            if not stack.fits(matrix):
                raise CheckpointError(f"{self.path}: {name} is {list(matrix.shape)}, other experts' is {stack.shape}")
            stack.add(matrix)
            scales.append(scale)
        return stack.matrices(), self._stack_input_scale(site, chosen, scales)

    def check_gated(self, prefix: str) -> tuple[torch.Size, Tensor | None, Tensor]:
        """Do all that `load_gated` does but the stacking, holding one expert at a time.

        Returns ([N, K], input scale as `load_gated` would give it, gate / up global scales `[1]` or `[E]`), and raises
        what `load_gated` would.
        """
        site = self.gated_site(prefix)
        chosen = [] if site.experts is None else self._choose_experts(site, None)
        shape, scales, ratios, gate_biases, up_biases = torch.Size(), [], [], [], []
        for pair in self._pairs(site, chosen) if site.experts is not None else (self._load_pair(site, None),):
            shape = pair.gate.shape
            scales.append(pair.input_scale)
            ratios.append(pair.gate.global_scale / pair.up.global_scale)
            gate_biases.append(pair.gate_bias)
            up_biases.append(pair.up_bias)
        if site.experts is None:
            return shape, scales[0], torch.stack(ratios)
        self._stack_bias(site, "gate", gate_biases)
        self._stack_bias(site, "up", up_biases)
        return shape, self._stack_input_scale(site, chosen, scales), torch.stack(ratios)

    def _stack_input_scale(self, site: GatedSite, chosen: list[int], scales: list[Tensor | None]) -> Tensor | None:
        present = [s for s in scales if s is not None]
        if not present:
            return None
        if len(present) < len(scales):
            without = _ranges([e for e, s in zip(chosen, scales, strict=True) if s is None])
            self._note(site.prefix, f"experts {without} have no usable input scale; the whole stack is quantised dynamically")
            return None
        return torch.stack(present)

    def _stack_bias(self, site: GatedSite, which: str, biases: list[Tensor | None]) -> Tensor | None:
        present = [b for b in biases if b is not None]
        if not present:
            return None
        if len(present) < len(biases):
            raise CheckpointError(
                f"{self.path}: {site.prefix}: only {len(present)} of {len(biases)} experts have a {which} bias"
            )
        return torch.stack(present)

    # ---- oddities ----

    def _note(self, where: str, text: str) -> None:
        self.report(Oddity(where, text))

    def report(self, oddity: Oddity) -> None:
        """Add one oddity; the same one twice counts once."""
        self._oddities[oddity] = None


# ---- small things ----


def _is_zero(codes: Tensor, block_scale: Tensor) -> bool:
    if codes.itemsize != 1 or block_scale.itemsize != 1:
        return False  # of a wrong dtype, which is for the constructor to tell
    magnitudes = codes.view(torch.uint8) & 0x77
    return not bool(magnitudes.any()) or not bool((block_scale.view(torch.uint8) & 0x7F).any())


def _ranges(indices: Iterable[int]) -> str:
    """ "0-5, 7" for 0 to 5 and 7."""
    spans: list[list[int]] = []
    for i in indices:
        if spans and i == spans[-1][1] + 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
