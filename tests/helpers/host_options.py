"""The names of hosts' options as they were read from their sources, for hosts that tests cannot import.

A row: title, our table, what stands in front of a name there, the names."""

NAMES = (
    (
        "verl 0.9.1 AlgoConfig", "verl.ALGORITHM", "",
        "gamma lam adv_estimator norm_adv_by_std_in_grpo use_kl_in_reward kl_penalty kl_ctrl use_pf_ppo pf_ppo "
        "filter_groups rollout_correction gdpo_reward_keys gdpo_reward_weights",
    ),
    (
        "verl 0.9.1 ActorConfig and its engines", "verl.ACTOR", "",
        "strategy ppo_mini_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
        "ppo_infer_micro_batch_size_per_gpu use_dynamic_bsz ppo_max_token_len_per_gpu "
        "ppo_infer_max_token_len_per_gpu clip_ratio clip_ratio_low clip_ratio_high freeze_vision_tower "
        "policy_loss clip_ratio_c loss_agg_mode loss_scale_factor entropy_coeff tau_pos tau_neg calculate_entropy "
        "calculate_sum_pi_squared use_kl_loss use_prefix_grouper use_torch_compile kl_loss_coef kl_loss_type "
        "ppo_epochs shuffle data_loader_seed checkpoint optim use_fused_kernels profiler engine rollout_n "
        "model_config global_batch_info qat entropy_from_logits_with_chunking entropy_from_logits_chunk_size "
        "megatron profile use_rollout_log_probs grad_clip ulysses_sequence_parallel_size entropy_checkpointing "
        "pad_to_length fsdp_config use_remove_padding veomni torchtitan",
    ),
    (
        "verl 0.9.1 PolicyLossConfig", "verl.ACTOR", "policy_loss.",
        "loss_mode clip_cov_ratio clip_cov_lb clip_cov_ub kl_cov_ratio ppo_kl_coef dro_beta rollout_correction",
    ),
    (
        "SkyRL 0.3.0 AlgorithmConfig", "skyrl", "",
        "advantage_estimator kl_ctrl kl_estimator_type use_kl_in_reward use_kl_loss kl_loss_coef use_entropy_loss "
        "entropy_loss_coef temperature advantage_batch_normalize value_head_prefix policy_loss_type "
        "loss_reduction grpo_norm_by_std zero_variance_filter zero_variance_filter_tol lambd gamma eps_clip_low "
        "eps_clip_high clip_ratio_c tis_imp_ratio_cap use_tis off_policy_correction sapo value_clip "
        "dynamic_sampling clip_cov kl_cov cispo dppo max_seq_len",
    ),
    (
        "NeMo-RL 0.6.0 GRPOConfig", "nemo_rl", "grpo.",
        "num_prompts_per_step num_generations_per_prompt max_num_epochs max_num_steps max_rollout_turns "
        "normalize_rewards advantage_clip_low advantage_clip_high use_leave_one_out_baseline val_period "
        "val_start_at val_batch_size val_at_start val_at_end max_val_samples val_num_generations_per_prompt "
        "stop_at_validation_metric stop_at_validation_threshold skip_reference_policy_logprobs_calculation seed "
        "async_grpo overlong_filtering use_dynamic_sampling dynamic_sampling_max_gen_batches batch_multiplier "
        "reward_shaping reward_scaling calculate_advantages_on_gpu seq_logprob_error_threshold "
        "invalid_tool_call_advantage malformed_thinking_advantage adv_estimator deduplicate_multimodal_data "
        "debug_payload_metrics",
    ),
    (
        "NeMo-RL 0.6.0 ClippedPGLossConfig", "nemo_rl", "loss_fn.",
        "disable_ppo_ratio token_level_loss sequence_level_importance_ratios ratio_clip_min ratio_clip_max "
        "ratio_clip_c reference_policy_kl_penalty reference_policy_kl_type kl_input_clamp_value "
        "kl_output_clamp_value use_kl_in_reward use_importance_sampling_correction "
        "truncated_importance_sampling_type truncated_importance_sampling_ratio "
        "truncated_importance_sampling_ratio_min use_on_policy_kl_approximation force_on_policy_ratio use_cispo "
        "positive_example_nll_weight",
    ),
    (
        "NeMo-RL 0.6.0 AdvEstimatorConfig", "nemo_rl", "grpo.adv_estimator.",
        "name normalize_rewards use_leave_one_out_baseline reward_weights minus_baseline",
    ),
    (
        "prime-rl 0.8.0 DefaultLossConfig, IPOLossConfig", "prime_rl", "",
        "type dppo_mask_low dppo_mask_high adv_tau kl_tau ipo_threshold",
    ),
    (
        "prime-rl 0.8.0 BaseAlgoConfig, GRPOAlgoConfig", "prime_rl", "",
        "action_loss_type sampling type length_penalty",
    ),
    (
        "axolotl 0.19.0 TRLConfig", "axolotl", "trl.",
        "beta max_completion_length use_vllm vllm_mode vllm_server_host vllm_server_port vllm_server_timeout "
        "vllm_guided_decoding_regex reward_funcs reward_weights generation_batch_size num_generations "
        "log_completions num_completions_to_print importance_sampling_level sync_ref_model ref_model_mixup_alpha "
        "ref_model_sync_steps scale_rewards temperature top_p top_k min_p repetition_penalty generation_kwargs "
        "chat_template_kwargs num_iterations epsilon epsilon_high use_liger_loss loss_type "
        "mask_truncated_completions entropy_coef use_adaptive_entropy entropy_target entropy_coef_delta "
        "entropy_coef_min entropy_coef_max vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max "
        "log_multimodal vllm_enable_sleep_mode rollout_func multi_objective_aggregation use_data_producer "
        "async_prefetch prefetch_depth vllm_sync_interval streaming_partial_batch streaming_min_groups "
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap "
        "off_policy_mask_threshold use_bias_correction_kl reward_num_workers replay_buffer_size "
        "replay_recompute_logps reroll_start_fraction reroll_max_groups skip_zero_advantage_batches "
        "vllm_lora_sync",
    ),
    (
        "slime 0.3.1 arguments.py", "slime_options", "",
        "train_backend debug_rollout_only debug_train_only load_debug_rollout_data custom_config_path "
        "padded_vocab_size actor_num_nodes actor_num_gpus_per_node rollout_num_gpus rollout_num_gpus_per_engine "
        "num_gpus_per_node colocate offload offload_train offload_rollout distributed_backend "
        "distributed_timeout_minutes qwen_gdn_backend train_env_vars update_weight_mode update_weight_transport "
        "release_train update_weight_disk_dir update_weight_disk_keep_files update_weight_delta_encoding "
        "update_weight_delta_checksum custom_update_weight_post_write_path update_weight_local_checkpoint_dir "
        "custom_model_provider_path recompute_loss_function log_probs_chunk_size only_train_params_name_list "
        "freeze_params_name_list freeze_indexer allgather_cp hf_checkpoint model_name rollout_function_path "
        "rollout_temperature rollout_top_p rollout_top_k rollout_max_context_len rollout_max_prompt_len "
        "rollout_max_response_len rollout_skip_special_tokens rollout_stop rollout_stop_token_ids rollout_shuffle "
        "rollout_seed over_sampling_batch_size dynamic_sampling_filter_path partial_rollout "
        "mask_offpolicy_in_partial_rollout custom_generate_function_path rollout_sample_hook_path "
        "custom_rollout_log_function_path custom_eval_rollout_log_function_path buffer_filter_path "
        "update_weight_buffer_size update_weights_interval keep_old_actor rollout_data_postprocess_path "
        "rollout_data_transport rollout_external_engine_addrs use_fault_tolerance rollout_health_check_interval "
        "rollout_health_check_timeout rollout_health_check_first_wait num_rollout num_epoch "
        "rollout_global_dataset data_source_path prompt_data apply_chat_template apply_chat_template_kwargs "
        "input_key label_key multimodal_keys metadata_key tool_key start_rollout_id rollout_batch_size "
        "n_samples_per_prompt global_batch_size num_steps_per_rollout micro_batch_size balance_data "
        "balance_by_flops use_dynamic_batch_size max_tokens_per_gpu log_probs_max_tokens_per_gpu "
        "eval_function_path eval_interval eval_prompt_data eval_config skip_eval_before_train eval_input_key "
        "eval_label_key eval_tool_key n_samples_per_eval_prompt eval_temperature eval_top_p eval_top_k "
        "eval_max_response_len eval_max_prompt_len eval_min_new_tokens eval_max_context_len ref_load "
        "ref_ckpt_step load save save_interval async_save no_save_optim save_hf seed clip_grad "
        "calculate_per_token_loss lr num_critic_only_steps megatron_config_path eps_clip eps_clip_high eps_clip_c "
        "value_clip kl_coef loss_type custom_loss_function_path kl_loss_type advantage_estimator "
        "compute_advantages_and_returns custom_advantage_function_path use_kl_loss kl_loss_coef use_unbiased_kl "
        "ref_update_interval entropy_coef gamma lambd normalize_advantages grpo_std_normalization "
        "rewards_normalization use_rollout_entropy get_mismatch_metrics reset_optimizer_states use_stateless_adam "
        "use_rollout_logprobs use_tis tis_clip tis_clip_low custom_tis_function_path "
        "custom_pg_loss_reducer_function_path use_routing_replay use_rollout_routing_replay use_opsm opsm_delta "
        "use_opd opd_type opd_kl_coef opd_teacher_load opd_teacher_ckpt_step use_wandb wandb_mode wandb_dir "
        "wandb_key wandb_host wandb_team wandb_group wandb_project wandb_random_suffix "
        "wandb_always_use_train_step log_multi_turn log_passrate log_reward_category log_correct_samples "
        "wandb_run_id use_tensorboard tb_project_name tb_experiment_name save_debug_rollout_data "
        "load_forge_rollout_data load_debug_rollout_data_subsample save_debug_train_data dump_details "
        "memory_snapshot_dir memory_snapshot_num_steps profile_target memory_recorder record_memory_history "
        "check_weight_update_equal http_proxy use_distributed_post rm_type reward_key eval_reward_key group_rm "
        "rm_url custom_rm_path custom_reward_post_process_path custom_convert_samples_to_train_data_path "
        "rollout_buffer_url fetch_trajectory_retry_times min_batch_collection_ratio rollout_task_type "
        "loss_mask_type data_pad_size_multiplier rollout_sample_filter_path rollout_all_samples_process_path "
        "custom_megatron_init_path custom_megatron_before_log_prob_hook_path "
        "custom_megatron_before_train_step_hook_path megatron_deepgemm_forward_layers "
        "megatron_deepgemm_forward_modules megatron_deepgemm_moe_forward_layers "
        "megatron_deepgemm_moe_forward_modules mtp_num_layers mtp_loss_scaling_factor enable_mtp_training ci_test "
        "ci_disable_kl_checker ci_train_rollout_logprob_abs_diff_threshold ci_save_grad_norm ci_load_grad_norm",
    ),
    (
        "SkyRL 0.3.0 cispo", "skyrl", "cispo.",
        "cispo_eps_clip_low cispo_eps_clip_high",
    ),
    (
        "SkyRL 0.3.0 sapo", "skyrl", "sapo.",
        "tau_pos tau_neg",
    ),
    (
        "SkyRL 0.3.0 clip_cov", "skyrl", "clip_cov.",
        "clip_ratio clip_cov_lb clip_cov_ub",
    ),
    (
        "SkyRL 0.3.0 kl_cov", "skyrl", "kl_cov.",
        "kl_cov_frac ppo_kl_coef",
    ),
    (
        "SkyRL 0.3.0 dppo", "skyrl", "dppo.",
        "dppo_type delta_low delta_high",
    ),
)  # fmt: skip
