"""Keys of a `config.json` that cannot change the logits, by the reason; from Hugging Face to itself they are carried.

    "use_cache" in INERT                # True

Sources: transformers `configuration_utils.py` (4.x and 5.x) and the families' `configuration_<family>.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "names, and who wrote the file": """
            _commit_hash _name_or_path architectures finetuning_task is_llama_config name_or_path olmo_block_group_size
            olmo_block_type tokenizer_class transformers.js_config transformers_version unsloth_fixed unsloth_version
            """,
        "how weights are stored or loaded, not what they are": """
            dtype torch_dtype torchscript use_bfloat16 tie_encoder_decoder tf_legacy_loss
            """,
        "which kernel computes the same attention": """
            _attn_implementation_autoset _flash_attn_2_enabled attn_implementation _attn_implementation
            reorder_and_upcast_attn use_flash_attention use_flash_attn pretraining_tp chunk_size_feed_forward
            """,
        "in training only": """
            attention_dropout attn_pdrop aux_loss_alpha classifier_dropout embd_pdrop hidden_dropout initializer_range
            moe_capacity moe_use_aux_free output_router_logits resid_pdrop router_aux_loss_coef router_jitter_noise
            """,
        "what a call returns, or keeps for the next": """
            output_attentions output_hidden_states output_scores return_dict return_dict_in_generate use_cache
            """,
        "numbers of special tokens": """
            bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id pad_token_id
            sep_token_id
            """,
        "how text is generated from logits": """
            bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
            encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length min_length
            no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix remove_invalid_values
            repetition_penalty suppress_tokens task_specific_params temperature top_k top_p typical_p
            """,
        "heads of classifiers, which are no part of a language model": """
            id2label label2id num_labels problem_type summary_activation summary_first_dropout summary_proj_to_labels
            summary_type summary_use_proj
            """,
        "of encoders beside a decoder, which is refused": """
            cross_attention_hidden_size is_decoder is_encoder_decoder
            """,
        "lengths that nothing depends on": """
            max_sequence_length model_max_length n_ctx seq_length
            """,
        "layers that predict further tokens, which no logit of the next token depends on": """
            num_mtp_layers num_nextn_predict_layers
            """,
    }
)
INERT = frozenset(word for words in REASONS.values() for word in words.split())
