"""What families have in common: reading a config.json, and saying where each of its tensors belongs."""

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import SHARING, DecoderConfig, Mixer
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families.layer_kinds import kinds_of
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.side_by_side import SideBySideConfig

# Without these a config.json is not whole; what else is missing has transformers' default.
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# The norms and the feed-forward of most families: ours -> Hugging Face's.
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
QUANTISED = "quantization_config"
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a tensor that holds several matrices: of each of its blocks of `block` rows, those from `first` to
    `last`."""

    block: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where (these rows of) a HF tensor belong: our path, the index along its stacked axes (layer, expert), and
    whether it is stored transposed. `member`: the number of the matrix, where the tensor is a stack of them. `columns`:
    as `rows`, of the last axis."""

    path: str
    index: tuple[int, ...] = ()
    transposed: bool = False
    rows: Rows | None = None
    member: int | None = None
    columns: Rows | None = None


# HF tensor name -> its places; more than one where the tensor holds several of our matrices.
Names = dict[str, tuple[Place, ...]]


def read(raw: dict, unsupported: Mapping[str, Sequence[Any]], quantised: str = "fp8") -> Any:
    """A config.json with defaults filled in, older ways of writing brought into one.

    Args:
      unsupported: fields, with the values that ask for nothing.
      quantised: the method by which files may be (see `checkpoint.packed`).

    Raises:
      UserError: a field is missing or malformed, or asks for what is not supported.
    """
    for field in REQUIRED:
        if field not in raw:
            raise UserError(f"config.json lacks the field {field!r}: it is not a whole {raw['model_type']} config")
    for field, harmless in unsupported.items():
        if field in raw and raw[field] not in harmless:
            raise _not_supported(raw, field)
    return read_whole(raw, quantised)


def read_whole(raw: dict, quantised: str = "fp8") -> Any:
    """transformers' own reading of a config.json.

    Raises:
      UserError: a field is malformed, or the weights are quantised in another way than `quantised`.
    """
    from transformers import CONFIG_MAPPING

    if (packed := raw.get(QUANTISED)) is not None and not _is_read(packed, quantised):
        raise _not_supported(raw, QUANTISED)
    try:
        # It writes into what it is given.
        given = copy.deepcopy({name: value for name, value in raw.items() if name != QUANTISED})
        return CONFIG_MAPPING[raw["model_type"]].from_dict(_with_infinities(given))
    # Of wrong types transformers' classes raise huggingface_hub's StrictDataclassError, an Exception alone.
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"config.json is no {raw['model_type']} config that transformers understands: {said}"
        ) from error


def _is_read(given: Any, method: str) -> bool:
    """Whether `checkpoint.packed` reads weights that are quantised so."""
    if not isinstance(given, dict) or given.get("quant_method") != method:
        return False
    usual = {
        "fmt": ("e4m3", "float8_e4m3fn"),
        "weight_block_size": (None, [128, 128]),
        "expert_dtype": ("fp8",),
    }
    return method != "fp8" or all(given[field] in values for field, values in usual.items() if field in given)


def _with_infinities(value: Any) -> Any:
    """The numbers in the place of what transformers 5 writes for those that JSON has no word for."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _with_infinities(each) for name, each in value.items()}
    return [_with_infinities(each) for each in value] if isinstance(value, list) else value


def _not_supported(raw: dict, field: str) -> UserError:
    return UserError(
        f"config.json has {field}={raw[field]!r}, which is not supported for model_type {raw['model_type']}"
    )


def config_of(
    read: Any,
    *,
    rotated: Sequence[bool] | None = None,
    partly_rotated: bool = False,
    mixers: Mapping[str, Mixer] | None = None,
    **differences: Any,
) -> DecoderConfig:
    """Our configuration of a config as transformers reads it, with what is different in this family.

    Args:
      rotated: which layers turn queries and keys by their positions (default: all).
      partly_rotated: a part of each head may be turned, though its class says nothing of that by default.
      mixers: by the layers' type, what mixes tokens where that is not attention.
    """
    heads, width = read.num_attention_heads, read.hidden_size
    head_dim = getattr(read, "head_dim", None) or width // heads
    common = {
        "vocab_size": read.vocab_size,
        "hidden_size": width,
        "intermediate_size": read.intermediate_size,
        "num_layers": read.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(read, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "tie_word_embeddings": bool(read.tie_word_embeddings),
        "max_position_embeddings": read.max_position_embeddings,
    }
    common |= kinds_of(read, head_dim, rotated, partly_rotated, mixers or {})
    if "norm_epsilon" not in differences:
        common["norm_epsilon"] = float(read.rms_norm_eps)
    if "activation" not in differences:
        common["activation"] = read.hidden_act
    return DecoderConfig(**common | differences)


def attention_biases(read: Any) -> dict[str, Any]:
    """Of a family that has one switch for those of all four projections."""
    return {"qkv_bias": bool(read.attention_bias), "attention_out_bias": bool(read.attention_bias)}


def experts_of(read: Any) -> ExpertsConfig:
    """The experts of Qwen's models, and of those that write them so; renormalised, where nothing is said of it."""
    return ExpertsConfig(
        count=read.num_experts,
        per_token=read.num_experts_per_tok,
        renormalise=bool(getattr(read, "norm_topk_prob", True)),
        balance_coefficient=float(read.router_aux_loss_coef),
        shared_intermediate_size=getattr(read, "shared_expert_intermediate_size", None),
    )


def linear(name: str, path: str, layer: int, bias: bool) -> Names:
    """The tensors of a torch linear layer: its weight [out, in] is our kernel transposed."""
    names = {f"{name}.weight": (Place(f"{path}/kernel", (layer,), True),)}
    return names | ({f"{name}.bias": (Place(f"{path}/bias", (layer,)),)} if bias else {})


def fused(name: str, parts: Mapping[str, Rows], layer: int, bias: bool) -> Names:
    """The tensors of a torch linear layer that holds several of ours, by path."""
    kernels = tuple(Place(f"{path}/kernel", (layer,), True, rows) for path, rows in parts.items())
    names: Names = {f"{name}.weight": kernels}
    if bias:
        names[f"{name}.bias"] = tuple(Place(f"{path}/bias", (layer,), False, rows) for path, rows in parts.items())
    return names


def consecutive(widths: Mapping[str, int]) -> dict[str, Rows]:
    """The rows of matrices that lie one behind the other in each block of a tensor, by their numbers of rows there."""
    ends = list(itertools.accumulate(widths.values()))
    return {path: Rows(ends[-1], end - widths[path], end) for path, end in zip(widths, ends, strict=True)}


def outer_names(config: DecoderConfig) -> Names:
    """Embedding, final norm and head, as most families name them."""
    names: Names = {"model.embed_tokens.weight": (Place("embed"),)} | norm_name(config, "model.norm", "final_norm")
    return names if config.tie_word_embeddings else names | {"lm_head.weight": (Place("head"),)}


def stack_of(config: DecoderConfig, layer: int, part: str) -> tuple[str, int]:
    """(the path of a part of a layer, the layer's number in the stack that it is)."""
    section = config.section_of(layer)
    path = f"{section}/{part}" if section else part
    return f"layers/{path}", config.layers_with(path).index(layer)


def attention_names(config: DecoderConfig, layer: int) -> Names:
    """Projections, and the norms of queries and keys; that of queries may hold a gate behind each head's, or each head
    has a gate."""
    if isinstance(config.kind_of_layer[layer].mixer, LatentAttentionConfig):
        return _latent_names(config, layer)
    kind, sharing = config.kind_of_layer[layer], config.section_of(layer) == SHARING
    prefix, head = f"model.layers.{layer}.self_attn", config.heads_of(kind).keys
    path, number = stack_of(config, layer, kind.mixer_name)
    if isinstance(kind.mixer, SideBySideConfig):
        path += "/attention"
    same, names = isinstance(kind.mixer, GlobalAttention) and kind.mixer.values_are_keys, {}
    for name in "qo" if sharing else "qko" if same else "qkvo":
        bias = config.attention_out_bias if name == "o" else config.qkv_bias
        if name == "q" and config.attention_gate == "channel":
            parts = {f"{path}/q": Rows(2 * head, 0, head), f"{path}/gate": Rows(2 * head, head, 2 * head)}
            names |= fused(f"{prefix}.q_proj", parts, number, bias)
        else:
            names |= linear(f"{prefix}.{name}_proj", f"{path}/{name}", number, bias)
    if config.attention_gate == "head":
        names |= linear(f"{prefix}.gate_proj", f"{path}/gate", number, False)
    if config.qk_norm is not None:
        normed = "q" if sharing else "qk"
        names |= {f"{prefix}.{name}_norm.weight": (Place(f"{path}/{name}_norm/scale", (number,)),) for name in normed}
    return names


def _latent_names(config: DecoderConfig, layer: int) -> Names:
    prefix, names = f"model.layers.{layer}.self_attn", {}
    path, number = stack_of(config, layer, LatentAttentionConfig.name)
    mixer = config.kind_of_layer[layer].mixer
    assert isinstance(mixer, LatentAttentionConfig)
    matrices = {"kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "o": "o_proj"}
    matrices |= {"q": "q_proj"} if mixer.query_rank is None else {"q_a": "q_a_proj", "q_b": "q_b_proj"}
    for ours, hf in matrices.items():
        bias = config.attention_out_bias if ours == "o" else config.qkv_bias and ours.endswith("_a")
        names |= linear(f"{prefix}.{hf}", f"{path}/{ours}", number, bias)
        if ours.endswith("_a"):
            names[f"{prefix}.{ours}_layernorm.weight"] = (Place(f"{path}/{ours}_norm/scale", (number,)),)
    return names


def mlp_names(config: DecoderConfig, layer: int, matrices: Mapping[str, str]) -> Names:
    """The feed-forward; without a gate, if the model has none."""
    names: Names = {}
    path, number = stack_of(config, layer, "mlp")
    for ours, hf in matrices.items():
        if ours != "gate" or config.gated:
            names |= linear(f"model.layers.{layer}.mlp.{hf}", f"{path}/{ours}", number, config.mlp_bias)
    return names


def fused_mlp_names(config: DecoderConfig, layer: int) -> Names:
    """The gated feed-forward whose two inner projections are one tensor."""
    inner, prefix = config.intermediate_size, f"model.layers.{layer}.mlp"
    parts = {"layers/mlp/gate": Rows(2 * inner, 0, inner), "layers/mlp/up": Rows(2 * inner, inner, 2 * inner)}
    names = fused(f"{prefix}.gate_up_proj", parts, layer, config.mlp_bias)
    return names | linear(f"{prefix}.down_proj", "layers/mlp/down", layer, config.mlp_bias)


def norm_name(config: DecoderConfig, name: str, path: str, index: tuple[int, ...] = ()) -> Names:
    """The tensors of a norm of hidden states."""
    names: Names = {f"{name}.weight": (Place(f"{path}/scale", index),)}
    biased = config.norm == "layer" and config.norm_bias
    return names | ({f"{name}.bias": (Place(f"{path}/bias", index),)} if biased else {})


def norm_names(config: DecoderConfig, layer: int, norms: Mapping[str, str]) -> Names:
    """The norms of hidden states within a block."""
    names: Names = {}
    for ours, hf in norms.items():
        path, number = stack_of(config, layer, ours)
        names |= norm_name(config, f"model.layers.{layer}.{hf}", path, (number,))
    return names


def standard_names(config: DecoderConfig, norms: Mapping[str, str], matrices: Mapping[str, str] = MLP) -> Names:
    """The names of a family that writes its tensors as Llama does, norms apart, and the feed-forward's `matrices`."""
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | mlp_names(config, layer, matrices) | norm_names(config, layer, norms)
    return names


def renamed(names: Names, changes: Mapping[str, str]) -> Names:
    """With parts of names in the place of others."""
    for ours, theirs in changes.items():
        names = {name.replace(ours, theirs): places for name, places in names.items()}
    return names


def experts_names(
    config: DecoderConfig, layer: int, block: str, matrices: Mapping[str, str], shared: str = "shared_expert"
) -> Names:
    """The router and the experts of a layer, under the name of their block, and that of the `shared` one; `matrices`:
    ours -> Hugging Face's."""
    experts = config.experts
    assert experts is not None
    prefix, (path, number) = f"model.layers.{layer}.{block}", stack_of(config, layer, config.experts_name or "")
    names: Names = {f"{prefix}.gate.weight": (Place(f"{path}/router", (number,), True),)}
    if experts.router.correction_bias:
        names[f"{prefix}.gate.e_score_correction_bias"] = (Place(f"{path}/correction_bias", (number,)),)
    names |= each_expert(config, number, f"{prefix}.experts", path, matrices)
    if experts.shared_intermediate_size is not None:
        if experts.shared_gate:
            names |= linear(f"{prefix}.{shared}_gate", f"{path}/shared_gate", number, False)
        for ours, hf in matrices.items():
            names |= linear(f"{prefix}.{shared}.{hf}", f"{path}/shared/{ours}", number, config.mlp_bias)
    return names


def each_expert(config: DecoderConfig, layer: int, prefix: str, path: str, matrices: Mapping[str, str]) -> Names:
    """The experts of a layer, by its number in their stack, one by one."""
    assert config.experts is not None
    names: Names = {}
    for expert in range(config.experts.count):
        for ours, hf in matrices.items():
            names[f"{prefix}.{expert}.{hf}.weight"] = (Place(f"{path}/{ours}/kernel", (layer, expert), True),)
    return names


def mixture_names(config: DecoderConfig, block: str, matrices: Mapping[str, str]) -> Names:
    """The names of a family that is written as Llama is, but for experts in the place of each feed-forward."""
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | norm_names(config, layer, NORMS)
        names |= experts_names(config, layer, block, matrices)
    return names
