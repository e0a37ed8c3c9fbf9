"""What to adapt and how: `LoraConfig`, with PEFT's field names and meanings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from lora_flax.errors import LoraError, at_most_ten
from lora_flax.expressions import expression_problem

Bias = Literal["none", "all", "lora_only"]
ALL_LINEAR = "all-linear"
# The adapter name used when none is given, as in PEFT.
DEFAULT = "default"
_DEFERRED = ("eva", "loftq", "qera")
_INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora", *_DEFERRED)

Names = str | Collection[str] | None
Tokens = Collection[int] | Mapping[str, Collection[int]] | None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Config for low-rank adaptation of selected layers (Hu et al. 2021, arXiv:2106.09685).

    Instances are hashable: collections are stored as sorted tuples, mappings as tuples of pairs.

    Dropout is applied only when a layer is called with a key, `layer(x, key=key)`. `wrap` rejects
    `target_modules=None` and lists the available names. Three initializations are set by functions
    called after `wrap`: `initialize_lora_eva_weights`, `replace_lora_weights_loftq` and
    `initialize_lora_qera_weights`.

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: dropout rate on the update's inputs during training, in [0, 1). Never applied
            to embeddings.
        target_modules: which layers to adapt: a list of names or dotted name suffixes
            (`"qkv_proj"`, `"mlp.down_proj"`), a regular expression that must match the full name,
            or `"all-linear"` for every dense layer except the output head `lm_head`. A stack of n
            layers has the names `layers.0.qkv_proj` to `layers.{n-1}.qkv_proj`, as in PEFT. The
            slices of a fused projection have names too (`layers.0.q_proj`). A regular expression
            selects a slice only if it does not match just any name in its place.
        exclude_modules: layers to leave out, in the same notation.
        layers_to_transform: indices of the layers to adapt, by default all; only valid when
            `target_modules` is a list of names. Does not restrict names given in full.
        layers_pattern: name or names of the list that the indices refer to (`"layers"`); defaults
            to the first number in a name.
        rank_pattern: a different `r` for names that match a key (a suffix, as a regular expression;
            the first match wins).
        alpha_pattern: a different `lora_alpha`, likewise.
        use_rslora: scale by `lora_alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: learn the norm of each output's weights separately from their direction (Liu et
            al. 2024, arXiv:2402.09353).
        bias: which biases train in addition to A and B: none, all in the model, or only those of
            wrapped layers (`"lora_only"`).
        lora_bias: add a bias to B and train it.
        init_lora_weights: how to initialize A and B: True as in loralib, False with both random
            (for tests), `"gaussian"`, `"orthogonal"`, `"pissa"` or `"pissa_niter_N"` (Meng et al.
            2024, arXiv:2404.02948), `"olora"` (Buyukakyuz 2024, arXiv:2406.01775), `"eva"` (A from
            the layers' inputs; Paischer et al. 2024, arXiv:2410.07170), `"loftq"` (from the
            quantization error; Li et al. 2023, arXiv:2310.08659) or `"qera"` (from the quantization
            error weighted by the layers' inputs; Zhang et al. 2025, arXiv:2410.06040; not in PEFT).
        modules_to_save: modules, by name suffix, that are trained and saved in full.
        trainable_token_indices: embedding rows to train and save: a list for `embed_tokens`, or a
            mapping from name suffix to list.
        fan_in_fan_out: only written to `adapter_config.json`, for PyTorch layers that store their
            weight as `[in, out]`; kernels here always are.

    Raises:
        LoraError: naming every field with an invalid value.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: Bias = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: Collection[str] | None = None
    trainable_token_indices: Tokens = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        problems = [*_number_problems(self), *_flag_problems(self), *_pattern_problems(self)]
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if not _are_names(value, or_text=name != "modules_to_save"):
                problems.append(f"{name} must be {_NAMES[name]}, not {value!r}")
            elif value is not None and not isinstance(value, str):
                # Static data of a module must be hashable, and sets have no defined order.
                object.__setattr__(self, name, tuple(sorted(set(value))))
        problems += _layer_problems(self)
        if not problems:
            problems = _expression_problems(self)
        if problems:
            raise LoraError("; ".join(at_most_ten(problems)))

    @property
    def scaling(self) -> float:
        """The factor on `B A x` unless a pattern overrides it."""
        return scaling(self.lora_alpha, self.r, self.use_rslora)

    @property
    def init_is_deferred(self) -> bool:
        """Whether A and B keep their default values until a later call sets them.

        That call needs data or the original weights (`"eva"`, `"loftq"`, `"qera"`).
        """
        return self.init_lora_weights in _DEFERRED

    def to_json(self) -> dict[str, Any]:
        """The fields as stored in `adapter_config.json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("rank_pattern", "alpha_pattern"):
            fields[name] = dict(fields[name])
        tokens: Any = self.trainable_token_indices  # ids, or (name, ids) pairs
        if tokens and not isinstance(tokens[0], int):
            fields["trainable_token_indices"] = {name: list(ids) for name, ids in tokens}
        alpha = self.lora_alpha
        fields["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


_LARGEST = float(np.finfo(np.float32).max)
# What PEFT, and `targets.matching`, put around an expression.
_FORMS = {
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
_NAMES = {
    "target_modules": f"a list of names, a regular expression or {ALL_LINEAR!r}",
    "exclude_modules": "a list of names or a regular expression",
    "layers_pattern": "a name or a list of names",
    "modules_to_save": "a list of names",
}


def scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """`alpha / r`, or `alpha / sqrt(r)`; 0 if there is no update (r = 0)."""
    if not r:
        return 0.0
    return alpha / (math.sqrt(r) if use_rslora else r)


def _number_problems(config: LoraConfig) -> list[str]:
    problems = []
    if not _is_int(config.r, 1):
        problems.append(f"r must be an integer of at least 1, not {config.r!r}")
    if not _is_positive(config.lora_alpha):
        problems.append(f"lora_alpha must be a number above 0, not {config.lora_alpha!r}")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        problems.append(f"lora_dropout must be a number in [0, 1), not {config.lora_dropout!r}")
    return problems


def _flag_problems(config: LoraConfig) -> list[str]:
    problems = [
        f"{name} must be true or false, not {getattr(config, name)!r}"
        for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
        if not isinstance(getattr(config, name), bool)
    ]
    if config.bias not in get_args(Bias):
        problems.append(f"bias must be none, all or lora_only, not {config.bias!r}")
    start = config.init_lora_weights
    if start not in _INITS and not re.fullmatch(r"pissa_niter_[0-9]{1,4}", str(start)):
        problems.append(
            "init_lora_weights must be true, false, gaussian, orthogonal, pissa, pissa_niter_N, "
            f"olora, eva, loftq or qera, not {start!r}"
        )
    if config.lora_bias and config.use_dora:
        problems.append("lora_bias and use_dora cannot be combined, as in PEFT")
    if config.lora_bias and start not in (True, False):
        problems.append(f"lora_bias requires init_lora_weights true or false, not {start!r}")
    if start == "orthogonal" and _is_int(config.r, 1) and config.r % 2:
        problems.append(f"init_lora_weights orthogonal needs an even r, not {config.r}")
    return problems


def _pattern_problems(config: LoraConfig) -> list[str]:
    problems = []
    for name, good, what in (
        ("rank_pattern", lambda v: _is_int(v, 1), "integers of at least 1"),
        ("alpha_pattern", _is_positive, "numbers above 0"),
    ):
        value = getattr(config, name)
        pairs = value.items() if isinstance(value, Mapping) else value
        pairs = () if value is None else pairs
        try:
            pairs = tuple((key, number) for key, number in pairs)
        except (TypeError, ValueError):
            problems.append(f"{name} must map names to {what}, not {value!r}")
            continue
        for key, number in pairs:
            if problem := expression_problem(key, r"(.*\.)?({})$"):
                problems.append(f"{name}: {key!r} is not a regular expression ({problem})")
            if not good(number):
                problems.append(f"{name} values must be {what}; {key!r} has {number!r}")
        object.__setattr__(config, name, pairs)
    return problems


def _layer_problems(config: LoraConfig) -> list[str]:
    problems = []
    layers = config.layers_to_transform
    if isinstance(layers, Collection):
        object.__setattr__(config, "layers_to_transform", tuple(layers))
    indices = [] if layers is None else layers if isinstance(layers, Collection) else [layers]
    if not all(_is_int(index, 0) for index in indices):
        problems.append(f"layers_to_transform must be layer indices, not {layers!r}")
    if indices and isinstance(config.target_modules, str):
        problems.append("layers_to_transform needs target_modules as a list of names")
    if config.layers_pattern and not indices:
        problems.append("layers_pattern needs layers_to_transform")
    tokens = config.trainable_token_indices
    lists = list(tokens.values()) if isinstance(tokens, Mapping) else [tokens]
    lists = [] if tokens is None else lists
    if not all(isinstance(ids, Collection) and all(_is_int(i, 0) for i in ids) for ids in lists):
        problems.append(
            f"trainable_token_indices must be token ids, or token ids by name, not {tokens!r}"
        )
    elif isinstance(tokens, Mapping):
        pairs = tuple((name, tuple(dict.fromkeys(ids))) for name, ids in tokens.items())
        object.__setattr__(config, "trainable_token_indices", pairs)
    elif tokens is not None:
        object.__setattr__(config, "trainable_token_indices", tuple(dict.fromkeys(tokens)))
    return problems


def _expression_problems(config: LoraConfig) -> list[str]:
    """What PEFT uses as a regular expression must be one."""
    problems = []
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value: str | Collection[str] = getattr(config, name) or ()
        listed = not isinstance(value, str)
        if listed and name in ("target_modules", "exclude_modules"):
            continue  # plain names
        expressions = [value] if isinstance(value, str) else value
        for expression in expressions:
            if problem := expression_problem(expression, _FORMS.get(name, "{}")):
                problems.append(f"{name}: {expression!r} is not a regular expression ({problem})")
    return problems


def _are_names(value: object, or_text: bool) -> bool:
    if value is None or isinstance(value, str):
        return value is None or or_text
    return (
        isinstance(value, Collection)
        and len(value) > 0
        and all(isinstance(name, str) and name for name in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    """Whether it is a number above 0 that is finite in float32, as the scale of an adapter is."""
    return isinstance(value, (int, float)) and _is_number(value) and 0 < value <= _LARGEST


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
