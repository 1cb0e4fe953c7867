"""Initial weights from published towers (SPEC section 3): EVA-02, EVA-CLIP, or another QLIP checkpoint.

    arrays, report = initialise(config, visual="timm/eva02_base_patch14_224.mim_in22k",
                                text="timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k", seed=0)

EVA's images are normalised with CLIP's mean and deviation, and its rotary positions are those of SPEC 1.2,
so only the patch kernel and the position table depend on the image size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qlip_core.architecture import TensorSpec, architecture, init_weights
from qlip_core.config import QLIPConfig
from qlip_core.errors import CheckpointError
from qlip_core.hub import find_model
from qlip_core.tensorfile import TensorFiles
from qlip_torch.train.eva_names import TEXT_LAYOUTS, VISUAL_LAYOUTS, Layout, Rule, whole
from qlip_torch.train.resample import resample_patch, resample_positions

_PATCH = "vision_model.embeddings.patch_embedding.weight"
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"
_PROJECTIONS = ("visual_projection.", "text_projection.")
_K_BIAS = ".self_attn.k_proj.bias"
_NOT_ASKED = "random, seed "
_LAYER = re.compile(r"\.layers\.\d+\.")
_PLACE = re.compile(r"vision_model\.quant_embed(_post)?|[^.]+")
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Report:
    """What was done with each tensor of the model (by our names) and of the file (by theirs)."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """Tower -> its file and layout."""
    used: tuple[str, ...] = ()
    """Copied unchanged."""
    resampled: Mapping[str, str] = field(default_factory=dict)
    """Copied and made to fit: name -> how."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Kept at their initial values: name -> why."""
    ignored: tuple[str, ...] = ()
    """Tensors of the files that this model has no use for."""

    def lines(self) -> list[str]:
        """The report as text, layers of a tower together."""
        out = [f"{tower} from {source}" for tower, source in self.sources.items()]
        out.append(f"used        {len(self.used)} tensors as they are")
        out += [f"resampled   {name}: {how}" for name, how in self.resampled.items()]
        groups: dict[tuple[str, str], int] = {}
        for name, why in self.left.items():
            untouched = _PLACE.match(name) if why.startswith(_NOT_ASKED) else None
            short = untouched[0] if untouched else _LAYER.sub(".layers.*.", name)
            groups[short, why] = groups.get((short, why), 0) + 1
        for (name, why), count in groups.items():
            times = f" ({count} tensors)" if count > 1 else ""
            out.append(f"left        {name}{times}: {why}")
        if self.ignored:
            out.append(f"ignored     {', '.join(self.ignored)}")
        return out


def initialise(
    config: QLIPConfig, visual: str | Path = "", text: str | Path = "", seed: int = 0
) -> tuple[dict[str, np.ndarray], Report]:
    """All weights of a model, float32 by published name: from the given towers, else random.

    visual: where the visual encoder comes from: EVA-02 (timm's names), EVA-CLIP (open_clip's names, or
    its own) or a QLIP checkpoint. text: where the text tower comes from: EVA-CLIP (open_clip's names) or
    a QLIP checkpoint. Either is a safetensors file, a folder or a hub id; "" leaves the tower random.
    Patch kernels and position tables are resampled to the model's grid. The logit scale starts at the
    config's value, whatever the files say, because the pairing of the two towers is new.

    Raises CheckpointError for a file of no known layout, tensors that are missing, unexpected, misshapen
    or not finite, and a key bias that the model has no place for.
    """
    arrays = init_weights(config, seed)
    table = architecture(config)
    sources: dict[str, str] = {}
    used: list[str] = []
    resampled: dict[str, str] = {}
    ignored: list[str] = []
    left = dict.fromkeys(table, f"{_NOT_ASKED}{seed}")
    left["logit_scale"] = f"starts at {config.logit_scale_init_value:g}"
    towers = (("visual encoder", "encoder", visual), ("text tower", "text", text))
    for tower, part, source in towers:
        if not str(source):
            continue
        layouts = _layouts(part, config)
        files, layout = _find(str(source), tower, layouts)
        sources[tower] = f"{source}: {layout.name}"
        loaded = _Tower(config, files, layout, part, f"{tower} from {source}")
        arrays |= loaded.arrays
        used += loaded.used
        resampled |= loaded.resampled
        ignored += loaded.ignored
        left |= loaded.left
    taken = {*used, *resampled}
    left = {name: why for name, why in left.items() if name not in taken}
    return arrays, Report(sources, tuple(used), resampled, left, tuple(ignored))


def _tower_specs(config: QLIPConfig, part: str) -> dict[str, TensorSpec]:
    """The tensors that a tower's file gives: not the logit scale, which keeps the config's value."""
    table = architecture(config)
    return {n: spec for n, spec in table.items() if spec.part == part and n != "logit_scale"}


def _layouts(part: str, config: QLIPConfig) -> tuple[Layout, ...]:
    prefix = "vision_model." if part == "encoder" else "text_model."
    first = f"{prefix}embeddings.position_embedding.weight"
    qlip = Layout(
        "QLIP",
        marker=first,
        prefix=prefix,
        rules=tuple(Rule(name, name, whole) for name in _tower_specs(config, part)),
        absent=re.compile("(?!)"),
        ignored=re.compile(r"vision_model\.quant_embed.*|.*\.rope\.freqs_(cos|sin)"),
    )
    return (*(VISUAL_LAYOUTS if part == "encoder" else TEXT_LAYOUTS), qlip)


class _Tower:
    """One tower read from a file: our arrays, and what was done with each tensor."""

    def __init__(
        self, config: QLIPConfig, files: TensorFiles, layout: Layout, part: str, where: str
    ) -> None:
        self.config = config
        self.arrays: dict[str, np.ndarray] = {}
        self.used: list[str] = []
        self.resampled: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.problems: list[str] = []
        specs = _tower_specs(config, part)
        tower = config.vision_config if part == "encoder" else config.text_config
        names = files.names
        consumed: set[str] = set()
        for rule in layout.rules_for(tower.num_hidden_layers):
            if rule.source not in names:
                continue
            if rule.target in specs and rule.target not in self.arrays:
                consumed.add(rule.source)
                self._take(rule, files, specs[rule.target].shape)
            elif rule.target not in specs and rule.target.endswith(_K_BIAS):
                # A key bias shifts all scores of a query equally, which softmax cancels, except under
                # rotation; so a model without one is equal to theirs only if theirs is zero.
                consumed.add(rule.source)
                if tower.rope and np.any(rule.take(files.float32(rule.source))):
                    self.problems.append(f"{rule.source} has a key bias, this model has none")
        for name in specs:
            if name in self.arrays or name in self.left:
                continue
            if layout.absent.fullmatch(name):
                kind = specs[name].init
                self.left[name] = "not in the file, " + ("random" if kind == "normal" else kind)
            else:
                self.problems.append(f"nothing for {name}")
        rest = [n for n in names if n.startswith(layout.prefix) and n not in consumed]
        self.ignored = [n for n in rest if layout.ignored.fullmatch(n)]
        self.problems += [f"unexpected {n}" for n in rest if not layout.ignored.fullmatch(n)]
        if self.problems:
            more = f"; and {len(self.problems) - 6} more" if len(self.problems) > 6 else ""
            raise CheckpointError(
                f"{where}, read as {layout.name}, does not fit the model: "
                f"{'; '.join(self.problems[:6])}{more}"
            )

    def _take(self, rule: Rule, files: TensorFiles, shape: tuple[int, ...]) -> None:
        name = rule.target
        try:
            values = rule.take(files.float32(rule.source))
            fitted, how = self._fit(name, values, shape)
        except CheckpointError:
            raise
        except ValueError as error:
            self.problems.append(f"{rule.source}: {error}")
            return
        if fitted.shape != shape:
            sizes = f"{rule.source} is {list(values.shape)}, {name} needs {list(shape)}"
            if name.startswith(_PROJECTIONS):
                self.left[name] = f"random, {sizes}"
            else:
                self.problems.append(sizes)
            return
        self.arrays[name] = np.ascontiguousarray(fitted)
        if how:
            self.resampled[name] = how
        else:
            self.used.append(name)

    def _fit(self, name: str, values: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
        """The values made to fit, and how ("" if unchanged)."""
        if values.shape == shape:
            return values, ""
        if name == _PATCH and values.ndim == 4 and values.shape[:2] == shape[:2]:
            old, new = values.shape[-1], shape[-1]
            if values.shape[-2] != old:
                raise ValueError(f"a patch of {values.shape[-2]}x{old}, expected a square one")
            return resample_patch(values, new), (
                f"patch {old}x{old} to {new}x{new}, pseudo-inverse of bicubic resizing"
            )
        if name == _POSITIONS and values.ndim == 2 and values.shape[1] == shape[1]:
            rows, columns = self.config.grid
            side = int((len(values) - 1) ** 0.5)
            return resample_positions(values, (rows, columns)), (
                f"grid {side}x{side} to {rows}x{columns}, bicubic; CLS kept"
            )
        if name == _TEXT_POSITIONS and values.ndim == 2 and len(values) > shape[0]:
            return values[: shape[0]], f"the first {shape[0]} of {len(values)} positions"
        return values, ""


# -- files -------------------------------------------------------------------------------------


def _find(source: str, tower: str, layouts: tuple[Layout, ...]) -> tuple[TensorFiles, Layout]:
    """The weights for this tower at a path or hub id, and their layout."""
    path = find_model(source)
    if path.is_file():
        groups = {path.name: [path]}
    else:
        groups = {}
        for file in sorted(path.glob("*.safetensors")):
            shard = _SHARD.fullmatch(file.name)
            groups.setdefault(shard[1] if shard else file.name, []).append(file)
    if not groups:
        raise CheckpointError(
            f"{tower} from {source}: no *.safetensors in it; pickled weights are never loaded, "
            "convert them first"
        )
    found = []
    for name, paths in groups.items():
        files = TensorFiles(paths, paths[0].parent)
        found += [(name, files, layout) for layout in layouts if layout.marker in files.names]
    if not found:
        kinds = ", ".join(f"{layout.name} ({layout.marker})" for layout in layouts)
        raise CheckpointError(f"{tower} from {source}: holds none of the known layouts: {kinds}")
    if len(found) > 1:
        names = ", ".join(f"{name} ({layout.name})" for name, _, layout in found)
        raise CheckpointError(f"{tower} from {source}: several fit: {names}; name one file")
    return found[0][1], found[0][2]
