"""Small random models of the families of transformers, for the sweep in test_architectures.py."""

from typing import Any

import torch

IDS = {"vocab_size": 12, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
"""The probe's tokens, with ids to spare."""

_SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 1}
_HEADS = _GROUPED | {"head_dim": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
_BART = {
    "is_decoder": True, "is_encoder_decoder": False,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.3,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_OPT = {
    "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    "word_embed_proj_dim": 32, "init_std": 0.3,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2),
    "gpt_neo": (
        "GPTNeoConfig",
        _SIZES | {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    ),
    "gptj": ("GPTJConfig", _GPT2 | {"rotary_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "codegen": ("CodeGenConfig", _GPT2 | {"rotary_dim": 4, "n_head": 4}),
    "openai-gpt": ("OpenAIGPTConfig", _GPT2),
    "ctrl": (
        "CTRLConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 64, "n_positions": 64, "initializer_range": 0.3},
    ),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 4}),
    "ministral": (
        "MinistralConfig",
        _HEADS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", _GROUPED | _EXPERTS),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2 (window)": (
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3": ("Qwen3Config", _HEADS),
    "qwen3_moe": ("Qwen3MoeConfig", _HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "qwen3_next": (
        "Qwen3NextConfig",
        _HEADS
        | _LINEAR
        | {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", _HEADS | _LINEAR),
    "gemma": ("GemmaConfig", _HEADS),
    "gemma2": ("Gemma2Config", _HEADS | {"sliding_window": 4}),
    "gemma3_text": (
        "Gemma3TextConfig",
        _HEADS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": _HEADS | {"sliding_window": 4},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 11,
            "boi_token_index": 10,
            "eoi_token_index": 9,
        },
    ),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED),
    "phimoe": ("PhimoeConfig", _GROUPED | _EXPERTS),
    "opt": ("OPTConfig", _OPT),
    "opt (projected)": ("OPTConfig", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}),
    "falcon": ("FalconConfig", _SIZES | {"num_kv_heads": 1, "ffn_hidden_size": 64}),
    "falcon (alibi)": ("FalconConfig", _SIZES | {"num_kv_heads": 1, "ffn_hidden_size": 64, "alibi": True}),
    "falcon_h1": ("FalconH1Config", _HEADS | _MAMBA | {"mamba_d_ssm": 64}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3}),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "initializer_range": 0.3,
        },
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
    ),
    "rwkv": (
        "RwkvConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "context_length": 64,
        },
    ),
    "stablelm": ("StableLmConfig", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "olmo": ("OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "olmo3": ("Olmo3Config", _GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmoe": ("OlmoeConfig", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", _GROUPED),
    "cohere2": (
        "Cohere2Config",
        _GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granite": ("GraniteConfig", _GROUPED),
    "granitemoe": ("GraniteMoeConfig", _GROUPED | _EXPERTS),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        _GROUPED | _EXPERTS | _MAMBA | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "lfm2": ("Lfm2Config", _GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "bamba": ("BambaConfig", _GROUPED | _MAMBA | {"attn_layer_indices": [1]}),
    "jamba": (
        "JambaConfig",
        _GROUPED
        | {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        _GROUPED
        | {
            "mamba_d_state": 4,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
            "num_key_value_heads": 2,
            "attention_head_dim": 32,
            "use_mem_rope": True,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        _GROUPED | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
    "xglm": (
        "XGLMConfig",
        {
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 2,
            "max_position_embeddings": 64,
            "init_std": 0.3,
        },
    ),
    "persimmon": ("PersimmonConfig", _SIZES),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3}),
    "biogpt": ("BioGptConfig", _SIZES),
    "helium": ("HeliumConfig", _HEADS),
    "glm": ("GlmConfig", _HEADS),
    "glm4": ("Glm4Config", _HEADS),
    "smollm3": ("SmolLM3Config", _GROUPED | {"no_rope_layers": [1, 0]}),
    "exaone4": ("Exaone4Config", _GROUPED | {"sliding_window": 4, "sliding_window_pattern": 2}),
    "nemotron": ("NemotronConfig", _HEADS),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
            "initializer_range": 0.3,
            "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
        },
    ),
    "ernie4_5": ("Ernie4_5Config", _HEADS),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", _HEADS),
    "arcee": ("ArceeConfig", _GROUPED),
    "apertus": ("ApertusConfig", _GROUPED),
    "seed_oss": ("SeedOssConfig", _HEADS),
    "deepseek_v3": (
        "DeepseekV3Config",
        _SIZES
        | {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": ("GptOssConfig", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        _SIZES | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 1, "bos_token_id": 2},
    ),
    "bart": ("BartConfig", _BART),
    "pegasus": ("PegasusConfig", _BART),
    "marian": ("MarianConfig", _BART),
    "roberta (decoder)": ("RobertaConfig", _SIZES | {"is_decoder": True}),
    "bert (decoder)": ("BertConfig", _SIZES | {"is_decoder": True}),
    "bert": ("BertConfig", _SIZES),
    "electra": ("ElectraConfig", _SIZES | {"embedding_size": 32}),
    "roformer": ("RoFormerConfig", _SIZES | {"is_decoder": True}),
    "xlnet": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "initializer_range": 0.3}),
    "xlm": ("XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}),
}


def make_model(family: str) -> Any:
    """A random model of a family, large enough weights that every fault shows."""
    import transformers

    name, settings = FAMILIES[family]
    if "text_config" in settings:
        settings = settings | {"text_config": IDS | settings["text_config"], "eos_token_id": 1}
    else:
        settings = IDS | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    return model.eval()
