"""Which of vLLM's settings decide a block's bytes: every field of its configuration classes, and every variable it
reads. `docs/identity.md` says why.

What is in neither list (another version's) counts as one that does: at worst that costs hits. The tests name it.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Inputs(NamedTuple):
    """Fields of one class: those that are part of the namespace, and those that are not."""

    included: frozenset[str]
    left_out: frozenset[str]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _inputs(included: str, left_out: str) -> Inputs:
    return Inputs(_names(included), _names(left_out))


CONFIGS: Final = {
    "VllmConfig": _inputs(
        "model_config cache_config parallel_config lora_config attention_config kernel_config mamba_config "
        "quant_config diffusion_config additional_config speculative_config",
        # Those that say nothing but how steps are made up, memory is used, graphs are compiled, copies are moved, the
        # engine is observed; and the weights (`load_config`), which have an identity of their own.
        "scheduler_config device_config load_config offload_config aux_output_config engram_config watermark_config "
        "structured_outputs_config observability_config logging_config compilation_config profiler_config "
        "kv_transfer_config kv_events_config ec_transfer_config ec_manager_config reasoning_config instance_id "
        "optimization_level performance_mode weight_transfer_config shutdown_timeout watchdog_config",
    ),
    "ModelConfig": _inputs(
        "dtype max_model_len quantization quantization_config disable_sliding_window hf_config hf_overrides "
        "model_class_overrides model_impl runner convert pooler_config multimodal_config override_attention_dtype",
        "model model_weights tokenizer tokenizer_mode trust_remote_code seed hf_text_config is_submodel_config "
        "word_embeddings_untied_by_checkpoint hf_config_path allowed_local_media_path allowed_media_domains revision "
        "code_revision tokenizer_revision spec_target_max_model_len allow_deprecated_quantization enforce_eager "
        "return_sampling_mask enable_return_routed_experts max_logprobs logprobs_mode use_fp64_gumbel "
        "enable_trace_replay disable_cascade_attn "
        "skip_tokenizer_init enable_prompt_embeds served_model_name config_format hf_token generation_config "
        "override_generation_config enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend "
        "sleep_mode_offload_cudagraph enable_nccl_comm_suspend enable_cumem_allocator logits_processors "
        "io_processor_plugin renderer_num_workers",
    ),
    "MultiModalConfig": _inputs(
        "media_io_kwargs mm_processor_kwargs mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype "
        "mm_encoder_fp8_scale_path video_pruning_rate video_pruning_method",
        "language_model_only limit_per_prompt enable_mm_embeds mm_processor_cache_gb mm_processor_cache_type "
        "mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode "
        "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin interleave_mm_strings skip_mm_profiling "
        "mm_tensor_ipc allow_missing_mm_embeddings mm_ipc_gpu_memory_gb",
    ),
    "PoolerConfig": _inputs(
        "task pooling_type seq_pooling_type tok_pooling_type",
        "use_activation enable_flash_late_interaction dimensions enable_chunked_processing max_embed_len logit_mean "
        "logit_sigma step_tag_id returned_token_ids",
    ),
    "CacheConfig": _inputs(
        "block_size cache_dtype calculate_kv_scales sliding_window kv_cache_dtype_skip_layers mamba_page_size_padded "
        "skip_page_size_padded mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype mamba_cache_mode "
        "replayssm_buffer_len use_replayssm use_kda_recoverssm kv_sharing_fast_prefill swa_bounded_replay",
        "prefix_caching_hash_algo hash_block_size prefix_match_unit kv_cache_layout "  # taken from where they are used
        "user_specified_block_size user_specified_mamba_block_size gpu_memory_utilization is_attention_free "
        "num_gpu_blocks_override "
        "enable_prefix_caching prefix_cache_retention_interval enable_mamba_shared_prefix_checkpoint "
        "enable_mamba_fine_grained_prefix_cache num_gpu_blocks "
        "num_cpu_blocks effective_attention_block_size kv_cache_size_tokens kv_cache_max_concurrency "
        "cache_hit_alignment_tokens kv_cache_memory_bytes kv_offloading_size kv_offloading_backend "
        "_block_size_resolved simple_cpu_offload_num_blocks",
    ),
    "ParallelConfig": _inputs(
        "tensor_parallel_size pipeline_parallel_size prefill_context_parallel_size decode_context_parallel_size "
        "dcp_kv_cache_interleave_size cp_kv_cache_interleave_size worker_cls sd_worker_cls worker_extension_cls",
        "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local "
        "data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port "
        "data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb is_moe_model enable_hc_sp "
        "enable_expert_parallel enable_batch_sharded_sampling enable_ep_weight_filter enable_eplb eplb_config "
        "expert_placement_strategy all2all_backend max_parallel_loading_workers disable_custom_all_reduce "
        "enable_shm_tensor_arena enable_elastic_ep elastic_ep_max_dp_size enable_dbo ubatch_size "
        "dbo_decode_token_threshold dbo_prefill_token_threshold disable_nccl_for_dp_synchronization "
        "ray_workers_use_nsight ray_runtime_env placement_group distributed_executor_backend master_addr master_port "
        "node_rank nnodes numa_bind numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids "
        "distributed_timeout_seconds cpu_distributed_timeout_seconds world_size rank _data_parallel_master_port_list "
        "_coord_store_port dcp_comm_backend dcp_q_replicate _allow_auto_resolve_cp_interleave_size "
        "data_parallel_index _api_process_count _api_process_rank enable_fault_tolerance fault_tolerance_config",
    ),
    "LoRAConfig": _inputs(
        "lora_dtype target_modules enable_tower_connector_lora",
        "max_lora_rank max_loras fully_sharded_loras max_cpu_loras default_mm_loras specialize_active_lora "
        "enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels",
    ),
    "AttentionConfig": _inputs(
        "use_trtllm_attention disable_flashinfer_q_quantization use_prefill_query_quantization indexer_kv_dtype "
        "indexer_sparse_logits hisparse_config use_non_causal",
        "backend backend_per_kind "  # the layers say which they have
        "minimax_m3_msa_decode_backend flash_attn_version flash_attn_max_num_splits_for_cuda_graph "
        "tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph mla_prefill_backend sparse_mla_force_mqa "
        "sparse_mla_prefill_workspace_factor flex_attn_block_m flex_attn_block_n flex_attn_q_block_size "
        "flex_attn_kv_block_size indexer_tp_shard_min_rows minimax_m3_indexer_cp trtllm_ragged_backend",
    ),
    "KernelConfig": _inputs(
        "moe_backend linear_backend linear_backend_per_quant",  # of one quantisation some quantise activations
        "ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune enable_cutedsl_warmup "
        "enable_jit_warmup sparse_indexer_topk_backend monokernel",
    ),
    "MambaConfig": _inputs(
        "backend enable_stochastic_rounding stochastic_rounding_philox_rounds", "ssu_algorithm"
    ),
    # Of a draft model, whose layers' KV is part of each block; nothing else that guesses keeps KV that is served.
    "SpeculativeConfig": _inputs(
        "method quantization moe_backend kv_cache_dtype use_heterogeneous_vocab draft_model_config "
        "draft_tensor_parallel_size",
        "enforce_eager num_speculative_tokens model tensor_parallel_size attention_backend max_model_len revision "
        "code_revision index_share_for_mtp_iteration disable_padded_drafter_batch disable_eagle_block_drop "
        "use_local_argmax_reduction prompt_lookup_max prompt_lookup_min parallel_drafting target_model_config "
        "target_parallel_config num_speculative_tokens_per_batch_size draft_parallel_config "
        "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor "
        "suffix_decoding_min_token_prob draft_load_config rejection_sample_method synthetic_acceptance_rates "
        "synthetic_acceptance_length enable_adaptive_verification draft_sample_method dspark_draft_topk "
        "disable_lookahead_block_hashes draft_lm_head_quantization fly_entropy_threshold fly_entropy_top_k "
        "fly_window_size xpress_topc",
    ),
}  # fmt: skip
"""Classes that are gone through field by field; fields that are left out are left out with all that is in them."""

VARIABLES: Final = _names(
    # Quantised activations, and how their scales are written.
    "VLLM_MARLIN_INPUT_DTYPE VLLM_CPU_INT4_W4A8 VLLM_HUMMING_ONLINE_QUANT_CONFIG VLLM_HUMMING_INPUT_QUANT_CONFIG "
    "VLLM_HUMMING_USE_F16_ACCUM VLLM_DEEPEPLL_NVFP4_DISPATCH VLLM_USE_DEEP_GEMM_E8M0 VLLM_B12X_MOE_FP4_FORCE_A16 "
    "VLLM_USE_FLASHINFER_MOE_INT4 VLLM_ROCM_USE_AITER_FP8BMM VLLM_ROCM_USE_AITER_FP4BMM "
    "VLLM_ROCM_USE_AITER_FP4_ASM_GEMM VLLM_ROCM_USE_AITER_MOE_SITUV2 VLLM_ROCM_USE_AITER_MOE_SITUV2_A8W4 "
    "VLLM_ROCM_USE_AITER_MOE_A4W4_DSV4 "
    "VLLM_ROCM_FP8_MFMA_PAGE_ATTN VLLM_ROCM_MUSE_MOE_ONLINE_QUANT VLLM_XPU_INC_WNA16_BACKEND "
    "VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD VLLM_DISABLED_KERNELS "
    # Less precise sums and products on purpose.
    "VLLM_ROCM_QUICK_REDUCE_QUANTIZATION VLLM_ROCM_QUICK_REDUCE_CAST_BF16_TO_FP16 VLLM_ROCM_MUSE_MOE_REDUCE_DTYPE "
    "VLLM_FLASHINFER_MOE_A2A_LOW_PRECISION_COMBINE VLLM_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION "
    "VLLM_FLOAT32_MATMUL_PRECISION "
    # Routing, kinds of attention, layouts, other code.
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY VLLM_MLA_DISABLE VLLM_SSM_CONV_STATE_LAYOUT "
    "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT VLLM_PLUGINS VLLM_VIDEO_LOADER_BACKEND VLLM_MEDIA_CONNECTOR"
)
"""Variables that change arithmetic on purpose, or how bytes are laid out."""

OTHER_VARIABLES: Final = _names(
    # How vLLM is built, where things lie, what is logged, how long is waited, how processes and copies are arranged.
    "VLLM_TARGET_DEVICE VLLM_MAIN_CUDA_VERSION MAX_JOBS NVCC_THREADS VLLM_USE_PRECOMPILED VLLM_USE_PRECOMPILED_RUST "
    "VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX VLLM_DOCKER_BUILD_CONTEXT VLLM_BUILD_COMMIT VLLM_BUILD_PIPELINE "
    "VLLM_BUILD_URL VLLM_IMAGE_TAG CMAKE_BUILD_TYPE VERBOSE VLLM_CONFIG_ROOT VLLM_CACHE_ROOT VLLM_HOST_IP VLLM_PORT "
    "VLLM_RPC_BASE_PATH VLLM_USE_FASTOKENS VLLM_RINGBUFFER_WARNING_INTERVAL CUDA_HOME VLLM_NCCL_SO_PATH "
    "LD_LIBRARY_PATH VLLM_ROCM_SLEEP_MEM_CHUNK_SIZE VLLM_PATTERN_MATCH_DEBUG VLLM_DEBUG_DUMP_PATH LOCAL_RANK "
    "CUDA_VISIBLE_DEVICES VLLM_ENGINE_READY_TIMEOUT_S VLLM_ENGINE_ITERATION_TIMEOUT_S "
    "VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT VLLM_CHAT_TEMPLATE_FUEL "
    "VLLM_API_KEY VLLM_DEBUG_LOG_API_SERVER_RESPONSE VLLM_REQUEST_BODY_LOG_LEVEL S3_ACCESS_KEY_ID "
    "S3_SECRET_ACCESS_KEY S3_ENDPOINT_URL VLLM_USAGE_STATS_SERVER VLLM_NO_USAGE_STATS VLLM_DO_NOT_TRACK "
    "VLLM_USAGE_SOURCE VLLM_CONFIGURE_LOGGING VLLM_LOGGING_CONFIG_PATH VLLM_LOGGING_LEVEL VLLM_LOGGING_STREAM "
    "VLLM_LOGGING_PREFIX VLLM_LOGGING_COLOR NO_COLOR FORCE_COLOR VLLM_LOG_STATS_INTERVAL VLLM_TRACE_FUNCTION "
    "VLLM_PP_LAYER_PARTITION VLLM_CPU_KVCACHE_SPACE VLLM_CPU_OMP_THREADS_BIND VLLM_CPU_NUM_OF_RESERVED_CPU "
    "VLLM_CPU_CI_ENV VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE VLLM_USE_RAY_COMPILED_DAG_OVERLAP_COMM "
    "VLLM_USE_RAY_WRAPPED_PP_COMM VLLM_XPU_PP_MICROBATCH VLLM_USE_RAY_V2_EXECUTOR_BACKEND "
    "VLLM_DISTRIBUTED_USE_SPLIT_GROUP VLLM_WORKER_MULTIPROC_METHOD VLLM_XLA_CACHE_PATH VLLM_XLA_CHECK_RECOMPILATION "
    "VLLM_XLA_USE_SPMD VLLM_KEEP_ALIVE_ON_ENGINE_DEATH VLLM_ALLOW_LONG_MAX_MODEL_LEN VLLM_HTTP_TIMEOUT_KEEP_ALIVE "
    "VLLM_HTTP_MAX_REQUEST_BODY_SIZE VLLM_MAX_N_SEQUENCES VLLM_MAX_COMPLETION_PROMPTS VLLM_MAX_STOP_STRINGS "
    "VLLM_MAX_NUM_BAD_WORDS VLLM_MAX_BAD_WORDS_TOTAL_TOKENS VLLM_SKIP_P2P_CHECK VLLM_DISABLE_PYNCCL "
    "VLLM_ENABLE_V1_MULTIPROCESSING VLLM_LOG_BATCHSIZE_INTERVAL VLLM_USE_RUST_FRONTEND VLLM_USE_RUST_BENCH "
    "VLLM_RUST_FRONTEND_PATH VLLM_SERVER_DEV_MODE VLLM_V1_OUTPUT_PROC_CHUNK_SIZE VLLM_RAY_PER_WORKER_GPUS "
    "VLLM_RAY_BUNDLE_INDICES VLLM_CUDART_SO_PATH VLLM_DP_RANK VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_DP_MASTER_IP "
    "VLLM_DP_MASTER_PORT VLLM_RANDOMIZE_DP_DUMMY_INPUTS VLLM_RAY_DP_PACK_STRATEGY VLLM_RAY_DP_PLACEMENT_NODE_IPS "
    "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY VLLM_RAY_EXTRA_ENV_VARS_TO_COPY VLLM_TPU_USING_PATHWAYS "
    "VLLM_MSGPACK_ZERO_COPY_THRESHOLD VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_DISABLE_REQUEST_ID_RANDOMIZATION "
    "VLLM_NIXL_SIDE_CHANNEL_HOST VLLM_NIXL_SIDE_CHANNEL_PORT VLLM_P2P_SIDE_CHANNEL_HOST VLLM_P2P_SIDE_CHANNEL_PORT "
    "VLLM_P2P_MAX_PEERS VLLM_P2P_HANDSHAKE_TIMEOUT_S VLLM_P2P_IDLE_TIMEOUT_S VLLM_EC_SIDE_CHANNEL_HOST "
    "VLLM_EC_SIDE_CHANNEL_PORT VLLM_MOONCAKE_CONNECTOR_TIMEOUT VLLM_MOONCAKE_BOOTSTRAP_PORT "
    "VLLM_MOONCAKE_STORE_TIER_LOG VLLM_MOONCAKE_LOAD_RECV_THREADS VLLM_MOONCAKE_DISK_STAGING_USABLE_RATIO "
    "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT MOONCAKE_PREFERRED_SEGMENT MOONCAKE_REQUESTER_LOCAL_HOSTNAME "
    "VLLM_MQ_MAX_CHUNK_BYTES_MB VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS "
    "VLLM_HAS_FLASHINFER_CUBIN VLLM_ENABLE_CUDAGRAPH_GC VLLM_LOOPBACK_IP VLLM_PROCESS_NAME_PREFIX "
    "VLLM_CUSTOM_SCOPES_FOR_PROFILING VLLM_NVTX_SCOPES_FOR_PROFILING VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES "
    "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME VLLM_DEEPEP_BUFFER_SIZE_MB VLLM_DBO_COMM_SMS VLLM_NCCL_INCLUDE_PATH "
    "VLLM_GC_DEBUG VLLM_DEBUG_WORKSPACE VLLM_LOG_MODEL_INSPECTION VLLM_DEBUG_MFU_METRICS "
    "VLLM_WEIGHT_OFFLOADING_DISABLE_PIN_MEMORY VLLM_WEIGHT_OFFLOADING_DISABLE_UVA VLLM_PLE_CPU_OFFLOAD "
    "VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS VLLM_WSL2_ENABLE_PIN_MEMORY VLLM_DISABLE_LOG_LOGO "
    "VLLM_ENABLE_CUDA_COMPATIBILITY VLLM_CUDA_COMPATIBILITY_PATH VLLM_SKIP_MODEL_NAME_VALIDATION "
    "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH VLLM_ELASTIC_EP_DRAIN_REQUESTS VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS "
    "VLLM_USE_SIMPLE_KV_OFFLOAD VLLM_USE_SPINLOOP_EXT VLLM_GPU_NIC_PCIE_MAPPING VLLM_NIC_SELECTION_VARS "
    "VLLM_SKIP_VERSION_SUFFIX VLLM_ENABLE_STARTUP_PLAN VLLM_GPU_SYNC_CHECK "
    # Which weights are loaded, and by what: they have an identity of their own, and so have adapters.
    "VLLM_USE_MODELSCOPE VLLM_TEST_FORCE_LOAD_FORMAT VLLM_FASTSAFETENSORS_QUEUE_SIZE VLLM_MODEL_REDIRECT_PATH "
    "VLLM_LORA_RESOLVER_CACHE_DIR VLLM_LORA_RESOLVER_HF_REPO_LIST VLLM_ALLOW_RUNTIME_LORA_UPDATING "
    # What tokens or images a prompt is made of, where they come from, what is sampled, how answers are read.
    "VLLM_ASSETS_CACHE VLLM_ASSETS_CACHE_MODEL_CLEAN VLLM_IMAGE_FETCH_TIMEOUT VLLM_VIDEO_FETCH_TIMEOUT "
    "VLLM_AUDIO_FETCH_TIMEOUT VLLM_MEDIA_CACHE VLLM_MEDIA_CACHE_MAX_SIZE_MB VLLM_MEDIA_CACHE_TTL_HOURS "
    "VLLM_MEDIA_FETCH_MAX_RETRIES VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES "
    "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB VLLM_MEDIA_URL_ALLOW_REDIRECTS VLLM_MEDIA_LOADING_THREAD_COUNT "
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB VLLM_MAX_AUDIO_DECODE_DURATION_S VLLM_MAX_AUDIO_DECODE_BYTES "
    "VLLM_MAX_EMBED_DECODE_BYTES VLLM_MAX_AUDIO_PREPROCESS_WORKERS VLLM_MAX_IMAGE_PIXELS VLLM_USE_FLASHINFER_SAMPLER "
    "VLLM_XPU_USE_SAMPLER_KERNEL VLLM_V1_USE_OUTLINES_CACHE VLLM_XGRAMMAR_CACHE_MB VLLM_REGEX_COMPILATION_TIMEOUT_S "
    "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS VLLM_ENFORCE_STRICT_TOOL_CALLING VLLM_COMPUTE_NANS_IN_LOGITS "
    "VLLM_RAISE_ON_LOGIT_NANS VLLM_ENABLE_RESPONSES_API_STORE VLLM_ENABLE_COHERE_API "
    "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS "
    "VLLM_SYSTEM_START_DATE VLLM_TOOL_JSON_ERROR_AUTOMATIC_RETRY VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN "
    "VLLM_BEAM_ALWAYS_CONSTRAIN_OUTPUT "
    # What comes of it is in kv.layout.
    "VLLM_KV_CACHE_LAYOUT "
    # Kernels of one layout, graphs, the order of sums: rounding. (The layers say which groups of KV there are.)
    "VLLM_BATCH_INVARIANT VLLM_REPLICATE_EMBED VLLM_TRITON_USE_TD "
    "VLLM_USE_STANDALONE_COMPILE VLLM_ENABLE_PREGRAD_PASSES VLLM_USE_BREAKABLE_CUDAGRAPH VLLM_XPU_ENABLE_XPU_GRAPH "
    "VLLM_USE_AOT_COMPILE "
    "VLLM_USE_BYTECODE_HOOK VLLM_FORCE_AOT_LOAD VLLM_USE_MEGA_AOT_ARTIFACT VLLM_CPU_ATTN_SPLIT_KV "
    "VLLM_ZENTORCH_WEIGHT_PREPACK VLLM_SPARSE_INDEXER_MAX_LOGITS_MB VLLM_USE_TRITON_AWQ VLLM_TRITON_FORCE_FIRST_CONFIG "
    "VLLM_TRITON_JIT_WARMUP_NUM_THREADS VLLM_USE_HW_AGNOSTIC VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE "
    "VLLM_GDN_DECODE_KERNEL VLLM_USE_OINK_OPS VLLM_ROCM_USE_AITER VLLM_ROCM_USE_AITER_CUSTOM_AR "
    "VLLM_ROCM_USE_AITER_LINEAR VLLM_ROCM_USE_AITER_LINEAR_HIPBMM VLLM_ROCM_USE_AITER_MOE "
    "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY VLLM_ROCM_USE_AITER_RMSNORM VLLM_ROCM_USE_AITER_MLA "
    "VLLM_ROCM_AITER_MLA_DCP_VERIFY VLLM_ROCM_AITER_MLA_ASM_PADDING VLLM_ROCM_USE_AITER_MHA "
    "VLLM_ROCM_USE_AITER_TRITON_SPARSE_MLA VLLM_ROCM_USE_AITER_TRITON_ROPE VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION "
    "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS VLLM_ROCM_AITER_MEGA_MOE_FUSE_SHARED_EXPERTS VLLM_ROCM_MONO_DECODE "
    "VLLM_ROCM_USE_AITER_TRITON_GEMM VLLM_ROCM_USE_SKINNY_GEMM VLLM_ROCM_FP8_PADDING VLLM_ROCM_MOE_PADDING "
    "VLLM_ROCM_QUICK_REDUCE_MAX_SIZE_BYTES_MB VLLM_ROCM_QUICK_REDUCE_MIN_SIZE_BYTES_MB "
    "VLLM_ROCM_QUICK_REDUCE_QUANTIZATION_MIN_SIZE_KB VLLM_DISABLE_COMPILE_CACHE VLLM_USE_LAYERNAME "
    "VLLM_MARLIN_USE_ATOMIC_ADD VLLM_HUMMING_MOE_GEMM_TYPE VLLM_USE_DEEP_GEMM VLLM_MOE_USE_DEEP_GEMM "
    "VLLM_USE_DEEP_GEMM_TMA_ALIGNED_SCALES VLLM_DCP_Q_REPLICATE VLLM_DEEP_GEMM_WARMUP VLLM_USE_FUSED_MOE_GROUPED_TOPK "
    "VLLM_MOE_SKIP_PADDING VLLM_KIMI_K3_SHARD_SP_SHARED_EXPERT VLLM_KIMI_K3_AUX_ATTN_RES_STREAM VLLM_KIMI_K3_GEMM_AR "
    "VLLM_STEP5_SHARD_SP_SHARED_EXPERT VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD VLLM_ENABLE_GEMM_RS "
    "VLLM_KIMI_K3_GEMM_RS "
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS "
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE "
    "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE VLLM_ALLREDUCE_USE_SYMM_MEM VLLM_ALLREDUCE_USE_FLASHINFER "
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC VLLM_TUNED_CONFIG_FOLDER VLLM_DEEPEP_HIGH_THROUGHPUT_FORCE_INTRA_NODE "
    "VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL VLLM_DEEPEP_V2_ALLOW_HYBRID_MODE VLLM_DEEPEP_V2_PREFER_OVERLAP "
    "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING VLLM_USE_NCCL_SYMM_MEM "
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION "
    "VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD VLLM_COMPILE_CACHE_SAVE_FORMAT "
    "VLLM_USE_V2_MODEL_RUNNER VLLM_LORA_DISABLE_PDL VLLM_XPU_FORCE_N_CONTIG_WEIGHT VLLM_USE_DIRECT_DCP_A2A "
    "VLLM_USE_DIRECT_DCP_Q_GATHER VLLM_USE_DIRECT_DCP_KV_GATHER VLLM_LORA_ENABLE_DUAL_STREAM "
    "VLLM_ENABLE_HPC_OPS"
)
"""Variables that do not."""
