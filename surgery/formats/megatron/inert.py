"""Megatron arguments that change nothing about a trained model: how it was trained, logged, saved, split, served.

    is_inert("wandb_project", ())       # True
    is_inert("log_softcap", ())         # False: nobody knows it, and its name speaks of the function

The names of core 0.10 to 0.20 (megatron/training `arguments.py`), families of them by their first word.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# the first words of arguments that belong to something which does not act in a trained GPT, or is refused by itself
SUBSYSTEMS = tuple(
    """
    adam_ adlr_ app_tag_ async_ barrier_ batch_invariant_ bert_ biencoder_ ckpt_ cp_comm_ cpu_offloading_ cuda_graph
    dataloader_ ddp_ decoupled_ deprecated_ dino_ dist_ckpt_ dsa_ dump_ empty_ enable_cuda enable_ft enable_gloo
    enable_msc enable_one exp_avg fault_ fim_ fine_grained_ flight_recorder_ fp4 fp8 fsdp_ ft_ gdp_ grpo_ gtp_
    hierarchical_ high_priority_ ict_ img_ indexer_ inference_ inprocess_ kitchen_ langrl_ linear_conv linear_key
    linear_num linear_value lion_ logits_load_ logits_save_ mamba_ manual_gc megatron_fsdp_ mhc_ moe_flex_
    moe_hybridep_ moe_paged_ moe_permute_ moe_routing_ moe_upcycling mtp_ muon_ mup_ nccl_ no_load_ no_save_
    non_persistent_ null_tokenizer_ nvtx_ object_storage one_logger otel_ outer_ overlap_ pin_cpu_ pytorch_profiler_
    recompute_ refit_ rerun_ retriever_ retro_ rl_ s3_ sft sgd_ sharp straggler_ swin_ te_ tensorboard_ tiktoken_
    timing_ titles_ tokenizer_ torch_fsdp2_ tp_comm_ use_checkpoint_ use_dist_ckpt use_gloo use_megatron_fsdp
    use_mp_args use_sharp vision_ wandb_ weight_decay wgrad_ yarn_
    """.split()
)
# first words that many arguments have which say how a run went; not those that speak of the function as well
VERBS = tuple(
    """
    check_ data_ disable_ distrib eval_ exit_ global_batch grad init_ iter load log loss lr main_ mask_ memory_
    micro min_ num_dataset offload optimizer override_ per_ perform_ profile record_ replication reset_ result_
    sample save seed skip start_ test_ train_ use_tokenizer use_torch_ valid
    """.split()
)
# arguments of ms-swift, which trains with Megatron: what is tuned and how, not what the model is
SWIFT = frozenset(
    """
    architectures beta freeze_aligner freeze_llm freeze_parameters freeze_vit label_smoothing lora_alpha lora_bias
    lora_dropout lora_dtype lora_rank max_epochs modules_to_save padding_free packing ref_load rlhf_type target_modules
    task_type torch_dtype trainable_parameters train_type tuner_type use_rslora
    """.split()
)
FUNCTION = re.compile("softcap|soft_cap|logit|rope|rotary|scal|multiplier|residual|window|attn|attention|norm|gate|"
                      "act_|activation|position|embed|router|moe|bias|temperature")  # fmt: skip
WORDS = frozenset(
    """
    apply_query_key_layer_scaling attention_dropout hidden_dropout
    _is_global_batch_size_explicitly_specified account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split accumulate_allreduce_grads_in_fp32 activation_offload_fraction
    add_position_embedding align_grad_reduce align_param_gather allow_ambiguous_pad_tokens apply_rope_fusion
    apply_wd_to_qk_layernorm attention_backend attention_softmax_in_fp32 auto_detect_ckpt_format bf16
    bias_dropout_fusion bias_swiglu_fusion block_data_path cache_mla_latents calc_ft_timeouts
    calculate_per_token_loss chat_template ckpt_format classes_fraction clip_grad clone_scatter_output_in_embedding
    config_logger_dir consumed_train_samples consumed_valid_samples context_parallel_size create_all_gather_group
    create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion curr_iteration
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers
    decoder_seq_length decrease_batch_size_if_needed defer_embedding_wgrad_compute delay_offload_until_cuda_graph
    delay_wgrad_compute delta_offload_bytes_across_pp_ranks deterministic_mode do_test do_train do_valid
    embedding_init_method_std embedding_path enable_chunked_prefill enable_experimental enable_full_sharding_in_hsdp
    encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size end_weight_decay
    eod_mask_loss ep_overlap_early_attn_memory_release error_injection_rate error_injection_type evidence_data_path
    expert_gtp_weight_remat_size expert_model_parallel_size expert_tensor_parallel_num_weight_shards
    expert_tensor_parallel_size external_cuda_graph fake_process_group finetune first_last_layers_bf16
    flash_attention_version flash_decode fp16 fp16_lm_cross_entropy fp32 fp32_residual_connection freeze_all_layers
    full_validation fused_residual_rmsnorm gpu_sniff_test_interval head_lr_mult hybrid_attention_ratio
    hybrid_context_parallel hybrid_mlp_ratio hysteresis initial_loss_scale iteration keep_fp8_transpose_cache
    keep_fp8_transpose_cache_when_using_custom_fsdp kv_lora_rank lazy_mpu_init local_rank
    log_loss_scale_to_tensorboard log_max_attention_logit log_params_norm logit_dtype loss_scale loss_scale_window
    make_vocab_size_divisible_by masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom merge_file
    metadata_path mid_level_dataset_surplus min_loss_scale mla_down_proj_fusion mlp_chunks_for_prefill
    mlp_chunks_for_training mmap_bin_files mock_data model_parallel_size model_type moe_aux_loss_coeff
    moe_combine_bwd_dtype moe_deepep_num_sms moe_dispatch_fwd_dtype moe_enable_deepep moe_enable_routing_replay
    moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_grouped_gemm moe_input_jitter_eps
    moe_layer_recompute moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
    moe_pad_experts_for_cuda_graph_inference moe_per_layer_logging moe_router_bias_update_rate moe_router_dtype
    moe_router_fusion moe_router_load_balancing_type moe_router_padding_for_fp8 moe_router_padding_for_quantization
    moe_router_quantile_balancing_ema moe_shared_expert_overlap moe_token_dispatcher_type moe_token_drop_policy
    moe_use_grouped_tensor moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff mrope_section mscale
    mscale_all_dim multiple_validation_sets no_persist_layer_norm no_weight_decay_cond_type num_channels num_classes
    num_distributed_optimizer_instances num_floating_point_operations_so_far num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_per_virtual_pipeline_stage num_speculative_tokens
    num_virtual_stages_per_pipeline_rank num_workers offset_sampling_seed_by_dp_rank output_bert_embeddings
    pad_vocab_size padded_vocab_size params_dtype patch_dim phase_transition_iterations
    pipeline_model_parallel_comm_backend pipeline_model_parallel_layout pipeline_model_parallel_size
    pipeline_model_parallel_split_rank pretrained_checkpoint q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold
    qk_head_dim qk_pos_emb_head_dim query_in_block_prob rampup_batch_size rank relative_attention_max_distance
    relative_attention_num_buckets reset_attention_mask reset_position_ids reuse_grad_buf_for_mxfp8_param_ag
    rope_type rotary_scaling_factor run_workload_inspector_server save_activations_interval
    scatter_gather_tensors_in_pipeline sequence_parallel short_seq_prob spec special_tokens split
    step_batch_size_schedule strict_fsdp_dtensor_load suggested_communication_unit_size symmetric_ar_type
    tensor_model_parallel_size tensor_parallel_num_weight_shards transformer_impl
    transformer_pipeline_model_parallel_size trust_remote_code use_cpu_initialization use_custom_fsdp
    use_distributed_optimizer use_flash_attn use_fused_weighted_squared_relu use_gigatoken
    use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert use_kitchen_attention
    use_layer_wise_distributed_optimizer use_layer_wise_param_layout use_legacy_static_engine use_mamba_mem_eff_path
    use_mcore_models use_mpi use_one_sent_docs use_persistent_ckpt_worker use_precision_aware_optimizer
    use_pytorch_profiler use_ring_exchange_p2p use_te_activation_func use_tp_pp_dp_mapping
    use_transformer_engine_op_fuser v_head_dim variable_seq_lengths verify_integrity
    virtual_pipeline_model_parallel_size vocab_extra_ids vocab_file vocab_size world_size yaml_cfg z_loss_strength
    """.split()
)


def is_inert(name: str, checked: Collection[str]) -> bool:
    """Whether an argument may have any value; `checked` were looked at by name."""
    if name in WORDS or name in SWIFT or name in checked or name.startswith(SUBSYSTEMS):
        return True
    return name.startswith(VERBS) and not FUNCTION.search(name)
