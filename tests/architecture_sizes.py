"""Tiny config values for every model type: what a field is called says how small it may be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, ResNetConfig

WIDTH, HEADS, FFN, EXPERT_FFN, VOCABULARY, POSITIONS = 64, 4, 96, 32, 128, 256

# Levels, tried in this order until a model can be built and run: everything small; widths kept a multiple of the head size;
# only depth, vocabulary and experts small; the defaults.
LEVELS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fields whose integers are cut to `size`, on levels up to `level`."""

    size: int
    level: int
    names: frozenset[str]

    @classmethod
    def of(cls, size: int, level: int, names: str) -> Rule:
        return cls(size, level, frozenset(names.split()))


RULES = (
    Rule.of(
        VOCABULARY,
        3,
        """vocab_size src_vocab_size tgt_vocab_size text_vocab_size decoder_vocab_size t2u_vocab_size vocab_size_per_layer_input
        encoder_vocab_size unit_hifi_gan_vocab_size encoder_hash_byte_group_vocab""",
    ),
    Rule.of(
        2,
        3,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers num_decoder_layers
        encoder_num_layers decoder_num_layers decoder_num_hidden_layers encoder_num_hidden_layers speech_encoder_layers text_encoder_layers
        t2u_encoder_layers t2u_decoder_layers l_layers x_layers r_layers memory_attention_num_layers encoder_hidden_layers decoder_depth
        fusion_num_hidden_layers resampler_depth num_h_layers num_l_layers layers num_attention_layers duration_predictor_layers
        folding_trunk_num_hidden_layers perceiver_resampler_num_layers num_blocks local_transformer_layers num_self_attends_per_block
        num_global_layers num_local_layers detector_num_hidden_layers num_mel_attn_blocks""",
    ),
    Rule.of(4, 3, "num_experts n_routed_experts num_local_experts moe_num_experts n_experts num_moe_experts ffn_num_experts"),
    Rule.of(2, 3, "num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts num_experts_per_token moe_router_topk num_selected_experts router_top_k top_k"),
    Rule.of(1, 3, "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers moe_layer_start_index moe_num_shared_experts"),
    Rule.of(
        HEADS,
        2,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads num_encoder_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads swa_num_attention_heads
        cross_num_attention_heads decoder_self_attention_heads resampler_heads resampler_n_heads""",
    ),
    Rule.of(
        2,
        2,
        """num_key_value_heads num_kv_heads n_kv_heads kv_n_heads n_head_kv decoder_num_key_value_heads encoder_num_key_value_heads
        num_global_key_value_heads swa_num_key_value_heads cross_num_key_value_heads kv_heads multi_query_group_num""",
    ),
    Rule.of(
        FFN,
        2,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size dim_feedforward dim_ff inner_dim
        encoder_intermediate_dim decoder_intermediate_size decoder_intermediate_dim d_inner mlp_dim feed_forward_size intermediate_dim
        ffn_intermediate_size feed_forward_hidden_size decoder_ff_dim encoder_ff_dim dim_ffn intermediate_size_mlp mlp_hidden_size
        feedforward_dim prediction_intermediate_size encoder_feedforward_dim decoder_feedforward_dim speech_encoder_intermediate_size
        t2u_encoder_ffn_dim t2u_decoder_ffn_dim dff encoder_linear_units decoder_linear_units pair_transition_intermediate_size
        memory_attention_feed_forward_hidden_size memory_attention_mlp_hidden_size memory_fuser_intermediate_dim alignment_intermediate_size""",
    ),
    Rule.of(
        EXPERT_FFN,
        2,
        """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        shared_intermediate_size moe_shared_intermediate_size expert_intermediate_size shared_expert_size expert_hidden_size
        shared_experts_intermediate_size""",
    ),
    Rule.of(
        WIDTH,
        1,
        """hidden_size d_model n_embd embed_dim embedding_size emb_dim width word_embed_proj_dim embedding_dim encoder_hidden_size
        decoder_hidden_size text_hidden_size out_hidden_size output_hidden_size backbone_hidden_size projection_dim text_embed_dim image_embed_dim
        cross_attention_hidden_size pooler_hidden_size dim attention_hidden_size fusion_hidden_size query_hidden_size entity_emb_size
        audio_hidden_size vision_hidden_size embed_size model_dim true_hidden_size encoder_hidden_dim lm_hidden_size vision_dim
        embedding_hidden_size projector_hidden_size feature_hidden_size mask_feature_size codevector_dim proj_codevector_dim encoder_embed_dim
        decoder_embed_dim dim_model proj_dim projection_hidden_size hidden_units output_dim fpn_hidden_size memory_attention_hidden_size
        output_channels pairwise_hidden_size cross_hidden_size lru_width""",
    ),
    Rule.of(
        16,
        1,
        """head_dim attention_head_size d_kv kv_channels d_head attention_head_dim global_head_dim cross_head_dim decoder_head_dim
        swa_head_dim v_head_dim head_size q_lora_rank kv_lora_rank mamba_d_state mamba_d_head mamba_headdim mamba_chunk_size chunk_size
        ssm_state_size linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input index_head_dim latent_dim linear_head_dim
        resampler_head_dim resampler_dim_head mamba_dt_rank rotary_dim upsample_groups""",
    ),
    Rule.of(8, 1, "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads query_length num_query_tokens index_topk num_latents"),
    Rule.of(8, 3, "num_queries"),
    Rule.of(4, 1, "linear_num_value_heads index_n_heads num_codebooks linear_num_heads"),
    Rule.of(2, 1, "linear_num_key_heads"),
    Rule.of(0, 1, "num_kv_shared_layers"),
    Rule.of(POSITIONS, 2, "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_seq_length max_max_position_embeddings"),
    Rule.of(64, 1, "max_target_positions codebook_size num_embeddings"),
    Rule.of(50, 1, "max_source_positions"),
    Rule.of(32, 1, "entity_vocab_size"),
)
_PER_LAYER = frozenset(("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"))
_SECTIONED = re.compile(r"Glm4[v6]|GlmOcr|GlmImage|Glmga|Qwen2_5")  # their code assumes sections that the config does not name
_SPECIAL_TOKENS = ("_token_id", "_token_index", "_id", "_index")


def _resnet() -> ResNetConfig:
    """A backbone without timm."""
    return ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 64, 64], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"], layer_type="basic")


def _detector() -> dict[str, Any]:
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": _resnet(), "num_queries": 8}


_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
_HEAD = {"head_dim": 16}
_QUERIES = {"num_queries": 8}
_DETECTORS = ("d_fine", "deimv2", "rt_detr", "rt_detr_v2", "lw_detr", "rf_detr", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4")

# What a type needs besides: values, or a function that makes them.
OVERRIDES: dict[str, dict[str, Any] | Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _SERIES),
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"), _detector),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), _HEAD),
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGAAZ": 90, "IMGIMGABZ": 91}},
    "dbrx": {
        "d_model": WIDTH,
        "n_heads": HEADS,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "autoformer": {**_SERIES, "label_length": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    **dict.fromkeys(_DETECTORS, _QUERIES),
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "funnel": {"block_sizes": [1, 1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 4},
    "lilt": {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {**_HEAD, "num_key_value_heads": 2},
    "openai-gpt": {"n_positions": POSITIONS},
    "step3p5": {"sliding_window": 16},
}


def tiny_values(config_class: type[PretrainedConfig], level: int) -> dict[str, Any]:
    """Keyword arguments of a small config of this class; sub-configs are made small too.

    Args:
        level: one of `LEVELS`, how much is cut.
    """
    if level > 3:
        return _overrides(config_class)
    default = _default(config_class)
    fields = [field.name for field in dataclasses.fields(config_class)] if dataclasses.is_dataclass(config_class) else []
    known = {name: _value(config_class, default, name) for name in fields}
    layers = next((known[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(known.get(name), int)), None)
    values = {name: small for name, value in known.items() if (small := _small(name, value, level, known, layers)) is not None}
    values |= _rotary_sections(known, values, bool(_SECTIONED.match(config_class.__name__)))
    return values | _sub_configs(config_class, default, level) | _overrides(config_class)


def _small(name: str, value: Any, level: int, known: dict[str, Any], layers: int | None) -> Any:
    """The small value of one field, or None to leave it."""
    if isinstance(value, bool):
        return None
    if name == "depths" and isinstance(value, list | tuple):
        return type(value)(1 for _ in value)
    if name in _PER_LAYER and isinstance(value, list | tuple) and layers and len(value) == layers:
        return _pick_layers(list(value))
    if not isinstance(value, int):
        return None
    if name.endswith(_SPECIAL_TOKENS) and value >= 100:
        return 100 + sum(map(ord, name)) % 27
    if name == "image_size" and level == 1 and isinstance(patch := known.get("patch_size"), int) and patch > 1 and value > 4 * patch:
        return 4 * patch
    rule = next((rule for rule in RULES if name in rule.names), None)
    if name == "embed_dim" and isinstance(heads := known.get("num_heads"), list | tuple):
        return 16 * heads[0] if level == 1 and value > 16 * heads[0] else None
    if rule is None or value <= rule.size:
        return _at_level_two(name, value, known) if level == 2 else None
    if level > rule.level:
        return _at_level_two(name, value, known) if level == 2 else None
    if "key_value" in name or "kv" in name:
        return HEADS if value == known.get("num_attention_heads") else rule.size
    return rule.size


def _at_level_two(name: str, value: int, known: dict[str, Any]) -> int | None:
    """Widths as a multiple of the head size that the defaults have."""
    if name not in ("hidden_size", "d_model", "n_embd", "embed_dim"):
        return None
    heads = next((known[key] for key in ("num_attention_heads", "n_head", "num_heads") if isinstance(known.get(key), int)), None)
    head = known.get("head_dim") if isinstance(known.get("head_dim"), int) else value // heads if heads else None
    return HEADS * head if head and value > HEADS * head else None


def _rotary_sections(known: dict[str, Any], values: dict[str, Any], sectioned: bool) -> dict[str, Any]:
    """Rotary frequencies for time, height and width, as many as the small heads have."""
    rope, width, heads = known.get("rope_parameters"), values.get("hidden_size", known.get("hidden_size")), values.get("num_attention_heads")
    heads = heads or known.get("num_attention_heads")
    if not isinstance(rope, dict) or not ("mrope_section" in rope or sectioned) or not isinstance(width, int) or not heads:
        return {}
    head = values.get("head_dim") or known.get("head_dim") or width // heads
    half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    return {"rope_parameters": {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}}


def _pick_layers(kinds: list[str]) -> list[str]:
    """Two layers, of different kinds if there are two kinds."""
    first = kinds[0]
    return [first, next((kind for kind in kinds if kind != first), first)]


def _sub_configs(config_class: type[PretrainedConfig], default: PretrainedConfig | None, level: int) -> dict[str, Any]:
    small = {}
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            small[name] = type(part)(**tiny_values(type(part), level))
    return small


def _overrides(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    found = OVERRIDES.get(config_class.model_type, {})
    return found() if callable(found) else dict(found)


def _default(config_class: type[PretrainedConfig]) -> PretrainedConfig | None:
    try:
        return config_class()
    except Exception:
        return None


def _value(config_class: type[PretrainedConfig], default: PretrainedConfig | None, name: str) -> Any:
    """The default of a field; some configs compute it, and some refuse to say (values that differ by layer)."""
    try:
        value = getattr(default, name) if default is not None else None
    except Exception:
        value = None
    declared = getattr(config_class, name, None)
    return declared if value is None and not callable(declared) else value
