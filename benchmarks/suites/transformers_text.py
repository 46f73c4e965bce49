"""transformers: encoders, decoders, mixtures of experts, encoder-decoders, state-space models."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.suites.transformers_kinds import GROUPED, TEXT, VOCABULARY, causal, kind, pairs, words

# encoders
kind("BertForMaskedLM", words(), **TEXT)
kind("BertForSequenceClassification", words(), num_labels=3, **TEXT)
kind("RobertaForSequenceClassification", words(), **{**TEXT, "max_position_embeddings": 40})
kind(
    "DistilBertForMaskedLM",
    words(),
    vocab_size=VOCABULARY,
    dim=64,
    n_layers=2,
    n_heads=4,
    hidden_dim=96,
    max_position_embeddings=32,
)
kind("AlbertForMaskedLM", words(), embedding_size=24, **TEXT)
kind("ElectraForPreTraining", words(), embedding_size=24, **TEXT)
kind(
    "DebertaV2ForSequenceClassification",
    words(),
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["p2c", "c2p"],
    **TEXT,
)
kind("MPNetForMaskedLM", words(), **{**TEXT, "max_position_embeddings": 40})
kind("SqueezeBertForSequenceClassification", words(), embedding_size=64, q_groups=2, k_groups=2, v_groups=2, **TEXT)
kind(
    "FNetForMaskedLM",
    causal(8),
    use_tpu_fourier_optimizations=False,
    **{k: v for k, v in TEXT.items() if k != "num_attention_heads"},
)
kind(
    "ModernBertForMaskedLM",
    words(),
    global_attn_every_n_layers=2,
    local_attention=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
    **TEXT,
)
kind(
    "XLNetLMHeadModel", words(), vocab_size=VOCABULARY, d_model=64, n_layer=2, n_head=4, d_inner=96, use_mems_eval=False
)

# decoders
kind(
    "GPT2LMHeadModel",
    words(),
    vocab_size=VOCABULARY,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=32,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
)
kind(
    "GPTNeoForCausalLM",
    causal(),
    use_cache=False,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=96,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_id=2,
)
kind("GPTNeoXForCausalLM", causal(), use_cache=False, bos_token_id=1, eos_token_id=2, **TEXT)
kind(
    "GPTJForCausalLM",
    causal(),
    vocab_size=VOCABULARY,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=32,
    rotary_dim=8,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
)
kind(
    "GPTBigCodeForCausalLM",
    causal(),
    vocab_size=VOCABULARY,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=32,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
)
kind(
    "OPTForCausalLM",
    words(),
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=96,
    word_embed_proj_dim=48,
    max_position_embeddings=32,
    use_cache=False,
)
kind(
    "BloomForCausalLM",
    words(),
    vocab_size=VOCABULARY,
    hidden_size=64,
    n_layer=2,
    n_head=4,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
)
kind("LlamaForCausalLM", words(), **GROUPED)
kind("LlamaForCausalLM", causal(), name="LlamaForCausalLM (cache returned)", **{**GROUPED, "use_cache": True})
kind("Qwen2ForCausalLM", words(), **GROUPED)
kind("Qwen3ForCausalLM", words(), head_dim=24, **GROUPED)
kind("MistralForCausalLM", words(), sliding_window=4, **GROUPED)
kind("GemmaForCausalLM", words(), head_dim=24, **{**GROUPED, "num_key_value_heads": 1})
kind("Gemma2ForCausalLM", words(), head_dim=16, sliding_window=4, **GROUPED)
kind("PhiForCausalLM", words(), **GROUPED)
kind("Phi3ForCausalLM", words(), **GROUPED)
kind(
    "FalconForCausalLM",
    words(),
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    multi_query=True,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
)
kind(
    "FalconForCausalLM",
    words(),
    name="FalconForCausalLM (new decoder)",
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    new_decoder_architecture=True,
    num_kv_heads=2,
    use_cache=False,
    bos_token_id=1,
    eos_token_id=2,
)
kind("StableLmForCausalLM", words(), **GROUPED)
kind("CohereForCausalLM", words(), **GROUPED)
kind("Olmo2ForCausalLM", words(), **GROUPED)

# mixtures of experts
kind("MixtralForCausalLM", words(), num_local_experts=4, num_experts_per_tok=2, **GROUPED)
kind(
    "Qwen2MoeForCausalLM",
    words(),
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=64,
    **GROUPED,
)
kind(
    "Qwen3MoeForCausalLM",
    words(),
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    head_dim=16,
    **GROUPED,
)
kind("OlmoeForCausalLM", words(), num_experts=4, num_experts_per_tok=2, **GROUPED)
kind(
    "SwitchTransformersForConditionalGeneration",
    pairs,
    vocab_size=VOCABULARY,
    d_model=64,
    d_kv=16,
    d_ff=96,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    num_experts=4,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    use_cache=False,
)

# encoder-decoders
kind(
    "T5ForConditionalGeneration",
    pairs,
    vocab_size=VOCABULARY,
    d_model=64,
    d_kv=12,
    d_ff=96,
    num_layers=2,
    num_heads=4,
    use_cache=False,
)
kind(
    "T5ForConditionalGeneration",
    pairs,
    name="T5ForConditionalGeneration (gated)",
    feed_forward_proj="gated-gelu",
    vocab_size=VOCABULARY,
    d_model=64,
    d_kv=16,
    d_ff=96,
    num_layers=2,
    num_heads=4,
    use_cache=False,
    tie_word_embeddings=False,
)
SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "use_cache": False,
}
kind("BartForConditionalGeneration", pairs, max_position_embeddings=32, **SEQ)
kind("MarianMTModel", pairs, max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=0, **SEQ)
kind(
    "WhisperForConditionalGeneration",
    lambda n: {"input_features": torch.randn(n, 16, 40), "decoder_input_ids": torch.randint(3, VOCABULARY, (n, 5))},
    num_mel_bins=16,
    max_source_positions=20,
    max_target_positions=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    **SEQ,
)

# state-space and recurrent
kind(
    "MambaForCausalLM",
    causal(),
    vocab_size=VOCABULARY,
    hidden_size=64,
    state_size=8,
    num_hidden_layers=2,
    use_cache=False,
    time_step_rank=6,
)
kind(
    "Mamba2ForCausalLM",
    causal(),
    vocab_size=VOCABULARY,
    hidden_size=64,
    state_size=8,
    num_hidden_layers=2,
    num_heads=8,
    head_dim=16,
    n_groups=2,
    expand=2,
    chunk_size=4,
    use_cache=False,
)
kind(
    "RwkvForCausalLM",
    causal(),
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    context_length=32,
    use_cache=False,
)
