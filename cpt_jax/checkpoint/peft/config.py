"""adapter_config.json of PEFT's LoRA: which layers it adapts, with which rank and scale (peft, tuners/lora/config.py)."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_jax.checkpoint.hub import is_hub_id
from cpt_jax.core.errors import UserError

FILE = "adapter_config.json"
# PEFT has no LoRA without a target; this name, which it knows, stands for none.
NO_TARGET = "dummy-target-modules"
MERGE = "merge it into its base with PEFT (merge_and_unload) and give the result as base"
# Fields that would change what the adapter computes, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), MERGE),
    "bias": ((None, "none"), MERGE),
    "fan_in_fan_out": ((None, False), "set it to false if the layers are torch.nn.Linear, as this architecture's are"),
    # The others change the base's weights too, so that the adapter alone is not enough.
    "init_lora_weights": (
        (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
        "save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA",
    ),
}
# Of training, or of PEFT itself: nothing that the trained adapter computes depends on them.
_IGNORED = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
    "velora_config",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftLoRA:
    """What an adapter_config.json asks for. `targets` and `excluded` are a regular expression or names (PEFT's
    target_modules, exclude_modules)."""

    rank: int
    alpha: float
    rank_stabilised: bool
    dora: bool
    targets: str | tuple[str, ...]
    parameters: tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    token_indices: Mapping[str, list[int]] | list[int]
    whole_modules: tuple[str, ...]
    ties: bool
    base: str | None

    def adapts(self, name: str) -> bool:
        """Whether the linear layer of this name has an adapter (peft, tuners_utils.py, check_target_module_exists)."""
        if _matches(self.excluded, name):
            return False
        if self.targets == "all-linear":
            return True
        if not isinstance(self.targets, str) and name in self.targets:
            # A whole name says of which layer it is.
            return True
        return _matches(self.targets, name) and (self.layers is None or self._layer(name) in self.layers)

    def adapts_parameter(self, name: str) -> bool:
        """Whether the parameter of this name has one."""
        return _matches(self.parameters, name)

    def rank_of(self, name: str) -> int:
        return self._by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What B (A x) is multiplied by (rank-stabilised: Kalajdzievski 2023, arXiv 2312.03732)."""
        rank = self.rank_of(name)
        return self._by_pattern(self.alpha_pattern, name, self.alpha) / (
            math.sqrt(rank) if self.rank_stabilised else rank
        )

    def _by_pattern(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """Of a module, which its weight may stand for."""
        parameter = f"{name}.weight"
        return _by_pattern(patterns, parameter if self.adapts_parameter(parameter) else name, default)

    def _layer(self, name: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
                return int(found[1])
        return None


def _matches(pattern: str | tuple[str, ...], name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in pattern)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def read_peft_config(directory: Path) -> PeftLoRA:
    """The adapter_config.json of a directory.

    Raises:
      UserError: there is none, it is malformed, or it asks for what is not supported.
    """
    path = directory / FILE
    if not path.exists():
        raise UserError(f"{directory} has no {FILE}: give a directory that PEFT's save_pretrained wrote")
    try:
        raw = json.loads(path.read_text())
        for field, (harmless, remedy) in _UNSUPPORTED.items():
            if raw.get(field) not in harmless:
                raise UserError(f"{path} has {field}={raw.get(field)!r}, which is not supported: {remedy}")
        found = _read(raw)
        known = {*_UNSUPPORTED, *_IGNORED, *_READ}
        if asked := sorted(field for field, value in raw.items() if field not in known and value):
            raise UserError(f"{path} has {asked[0]}={raw[asked[0]]!r}, which is not supported: {MERGE}")
        for pattern in (found.targets, found.excluded, *found.rank_pattern, *found.alpha_pattern):
            re.compile(pattern if isinstance(pattern, str) else "")
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise UserError(f"{path} is no LoRA configuration ({type(error).__name__}: {error}): save it again") from error
    for field, least in (("r", found.rank), ("rank_pattern", min(found.rank_pattern.values(), default=1))):
        if least < 1:
            raise UserError(f"{path} has {field}={raw[field]!r}: a rank is at least 1")
    for field, least in (("lora_alpha", found.alpha), ("alpha_pattern", min(found.alpha_pattern.values(), default=1))):
        if not least > 0:
            raise UserError(f"{path} has {field}={raw[field]!r}: alpha is greater than 0")
    return found


_READ = {
    "alpha_pattern",
    "base_model_name_or_path",
    "revision",
    "ensure_weight_tying",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}


def _read(raw: dict) -> PeftLoRA:
    tokens = raw.get("trainable_token_indices") or []
    targets = raw.get("target_modules") if raw.get("target_parameters") else raw["target_modules"]
    return PeftLoRA(
        rank=int(raw["r"]),
        alpha=float(raw["lora_alpha"]),
        rank_stabilised=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        targets=_names(targets),
        parameters=tuple(raw.get("target_parameters") or ()),
        excluded=_names(raw.get("exclude_modules")),
        layers=_listed(raw.get("layers_to_transform")) or None,
        layers_pattern=_listed(raw.get("layers_pattern")),
        rank_pattern={key: int(rank) for key, rank in (raw.get("rank_pattern") or {}).items()},
        alpha_pattern={key: float(alpha) for key, alpha in (raw.get("alpha_pattern") or {}).items()},
        token_indices={name: list(ids) for name, ids in tokens.items()} if isinstance(tokens, dict) else list(tokens),
        whole_modules=tuple(raw.get("modules_to_save") or ()),
        ties=bool(raw.get("ensure_weight_tying")),
        base=_base(raw.get("base_model_name_or_path"), raw.get("revision")),
    )


def _base(name: str | None, revision: str | None) -> str | None:
    """A hub id with its revision, as `resolve_base` takes it."""
    return f"{name}@{revision}" if name and revision and is_hub_id(name) else name


def _names(given: str | list[str] | None) -> str | tuple[str, ...]:
    return given if isinstance(given, str) else tuple(given or ())


def _listed(given: Any) -> tuple[Any, ...]:
    """One value, or a list of them; PEFT takes an empty list for none."""
    if given is None or given == "":
        return ()
    return tuple(given) if isinstance(given, list) else (given,)
