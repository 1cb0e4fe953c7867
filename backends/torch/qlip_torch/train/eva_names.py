"""Where to find each of our tensors in a published EVA-02 or EVA-CLIP file, declared by name.

A layout lists rules, ours <- theirs, and which part of theirs is taken. Several rules may name the same
tensor of ours (a fused or a split projection): the first whose source is in the file applies. Nothing is
guessed from a shape, and a source tensor that no rule takes and no pattern ignores is an error.

Names from timm's `eva.py` (EVA-02), open_clip's CLIP with a timm tower and EVA's own `eva_vit_model.py`
(EVA-CLIP), and open_clip's text transformer. `{i}` stands for the number of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Take = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """`target` (ours) is `take` of `source` (theirs)."""

    target: str
    source: str
    take: Take


@dataclass(frozen=True)
class Layout:
    """How one kind of file names a tower.

    `marker` is the tensor that identifies the kind; tensors below `prefix` must all be known; `ignored`
    are those of no use to us; `absent` are ours that this kind of file may lack, which then keep their
    initial values.
    """

    name: str
    marker: str
    prefix: str
    rules: tuple[Rule, ...]
    absent: re.Pattern[str]
    ignored: re.Pattern[str]

    def rules_for(self, layers: int) -> Iterator[Rule]:
        """The rules with the numbers of `layers` layers filled in."""
        for rule in self.rules:
            if "{i}" not in rule.target:
                yield rule
                continue
            for i in range(layers):
                number = str(i)
                target, source = (t.replace("{i}", number) for t in (rule.target, rule.source))
                yield Rule(target, source, rule.take)


# -- what is taken of a source tensor ----------------------------------------------------------


def whole(values: np.ndarray) -> np.ndarray:
    return values


def row(values: np.ndarray) -> np.ndarray:
    """[1, 1, D] -> [D], [1, N, D] -> [N, D]: drop leading axes of length 1."""
    while values.ndim > 1 and values.shape[0] == 1:
        values = values[0]
    return values


def transposed(values: np.ndarray) -> np.ndarray:
    return values.T


def share(number: int, count: int) -> Take:
    """Part `number` of `count` equal runs of rows of a fused projection."""

    def take(values: np.ndarray) -> np.ndarray:
        if len(values) % count:
            raise ValueError(f"{len(values)} rows do not divide into {count} equal parts")
        size = len(values) // count
        return values[number * size : (number + 1) * size]

    return take


# -- tables ------------------------------------------------------------------------------------

_VISION = "vision_model.encoder.layers.{i}."
_TEXT = "text_model.encoder.layers.{i}."


def _affine(target: str, source: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{target}.{k}", f"{source}.{k}", whole) for k in ("weight", "bias"))


def _eva_block(prefix: str) -> tuple[Rule, ...]:
    """timm's names and EVA's own together: they differ only inside attention and MLP."""
    block = f"{prefix}blocks.{{i}}."
    attention, theirs = f"{_VISION}self_attn.", f"{block}attn."
    rules = [*_affine(f"{_VISION}layer_norm1", f"{block}norm1")]
    rules += _affine(f"{_VISION}layer_norm2", f"{block}norm2")
    for number, name in enumerate("qkv"):
        ours = f"{attention}{name}_proj"
        rules += [
            Rule(f"{ours}.weight", f"{theirs}{name}_proj.weight", whole),
            Rule(f"{ours}.weight", f"{theirs}qkv.weight", share(number, 3)),
            Rule(f"{ours}.bias", f"{theirs}{name}_proj.bias", whole),
            Rule(f"{ours}.bias", f"{theirs}{name}_bias", whole),
            Rule(f"{ours}.bias", f"{theirs}qkv.bias", share(number, 3)),
        ]
    for source in ("norm", "inner_attn_ln"):
        rules += _affine(f"{attention}inner_attn_ln", f"{theirs}{source}")
    rules += _affine(f"{attention}out_proj", f"{theirs}proj")

    mlp, theirs = f"{_VISION}mlp.", f"{block}mlp."
    for number, (ours, split) in enumerate((("w1", "fc1_g"), ("w2", "fc1_x"))):
        rules += [*_affine(f"{mlp}{ours}", f"{theirs}{split}")]
        rules += _affine(f"{mlp}{ours}", f"{theirs}{ours}")
        # timm packs gate and value, the gate first, if no norm follows them.
        for kind in ("weight", "bias"):
            rules.append(Rule(f"{mlp}{ours}.{kind}", f"{theirs}fc1.{kind}", share(number, 2)))
    for source in ("fc2", "w3"):
        rules += _affine(f"{mlp}w3", f"{theirs}{source}")
    for source in ("norm", "ffn_ln"):
        rules += _affine(f"{mlp}ffn_ln", f"{theirs}{source}")
    for name in ("fc1", "fc2"):
        rules += _affine(f"{mlp}{name}", f"{theirs}{name}")
    return tuple(rules)


def _eva_tower(prefix: str) -> tuple[Rule, ...]:
    embeddings = "vision_model.embeddings"
    return (
        Rule(f"{embeddings}.class_embedding", f"{prefix}cls_token", row),
        Rule(f"{embeddings}.position_embedding.weight", f"{prefix}pos_embed", row),
        *_affine(f"{embeddings}.patch_embedding", f"{prefix}patch_embed.proj"),
        *_eva_block(prefix),
        # Masked image modelling ends in `norm`; timm calls it `fc_norm` if it pools by mean.
        *_affine("vision_model.post_layernorm", f"{prefix}norm"),
        *_affine("vision_model.post_layernorm", f"{prefix}fc_norm"),
    )


_EVA_IGNORED = r"mask_token|lm_head\.(weight|bias)|(.*\.)?rope\..*"
# EVA-02 has no norm inside attention; if a file lacks it, ours starts as a plain LayerNorm.
_INNER_NORM = r".*\.self_attn\.inner_attn_ln\.(weight|bias)"
_K_BIAS = r".*\.self_attn\.k_proj\.bias"
_FFN_NORM = r"vision_model\..*\.mlp\.ffn_ln\.(weight|bias)"
_PROJECTION = r"visual_projection\.(weight|bias)"


def _eva_clip(name: str, prefix: str) -> Layout:
    return Layout(
        name,
        marker=f"{prefix}blocks.0.norm1.weight",
        prefix=prefix,
        rules=(*_eva_tower(prefix), *_affine("visual_projection", f"{prefix}head")),
        absent=re.compile(f"{_K_BIAS}|visual_projection.bias"),
        ignored=re.compile(re.escape(prefix) + f"({_EVA_IGNORED})"),
    )


EVA02 = Layout(
    "EVA-02 (timm's names)",
    marker="blocks.0.norm1.weight",
    prefix="",
    rules=_eva_tower(""),
    absent=re.compile("|".join((_K_BIAS, _INNER_NORM, _FFN_NORM, _PROJECTION))),
    # The classifier of a fine-tuned model has no counterpart here.
    ignored=re.compile(rf"{_EVA_IGNORED}|head\.(weight|bias)"),
)
OPEN_CLIP = _eva_clip("EVA-CLIP (open_clip's names)", "visual.trunk.")
EVA_CLIP = _eva_clip("EVA-CLIP (its own names)", "visual.")


def _open_clip_text() -> tuple[Rule, ...]:
    block, attention = "text.transformer.resblocks.{i}.", f"{_TEXT}self_attn."
    rules = [
        Rule("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight", whole),
        Rule("text_model.embeddings.position_embedding.weight", "text.positional_embedding", whole),
        *_affine(f"{_TEXT}layer_norm1", f"{block}ln_1"),
        *_affine(f"{_TEXT}layer_norm2", f"{block}ln_2"),
        *_affine(f"{attention}out_proj", f"{block}attn.out_proj"),
        *_affine(f"{_TEXT}mlp.fc1", f"{block}mlp.c_fc"),
        *_affine(f"{_TEXT}mlp.fc2", f"{block}mlp.c_proj"),
        *_affine("text_model.final_layer_norm", "text.ln_final"),
        # A bare parameter multiplies from the right and must be transposed; a linear layer (with a bias) need not.
        Rule("text_projection.weight", "text.text_projection", transposed),
        *_affine("text_projection", "text.text_projection"),
    ]
    for number, name in enumerate("qkv"):
        for ours, theirs in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            source = f"{block}attn.{theirs}"
            rules.append(Rule(f"{attention}{name}_proj.{ours}", source, share(number, 3)))
    return tuple(rules)


OPEN_CLIP_TEXT = Layout(
    "EVA-CLIP's text tower (open_clip's names)",
    marker="text.token_embedding.weight",
    prefix="text.",
    rules=_open_clip_text(),
    absent=re.compile("text_projection.bias"),
    ignored=re.compile(r"text\.attn_mask"),
)

VISUAL_LAYOUTS = (EVA02, OPEN_CLIP, EVA_CLIP)
TEXT_LAYOUTS = (OPEN_CLIP_TEXT,)
