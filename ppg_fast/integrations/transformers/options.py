"""What becomes of the options of transformers' Trainer around a patched model, without transformers.

A patched model never sees TrainingArguments: what they ask of it arrives as arguments of its forward, so that a refused
option is found there, and named.
"""

from ppg_fast.integrations.options import RUN, hosts_own, obeyed, refused

LOSS = "loss"
OPTIONS = (  # of TrainingArguments
    refused(LOSS, "label_smoothing_factor", 0.0, "it takes the labels away, for a loss of logits that are never made"),
    refused(LOSS, "use_liger_kernel", False, "it replaces the forward of the patched model by one of its own losses"),
    obeyed(LOSS, "gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size "
           "auto_find_batch_size average_tokens_across_devices", "num_items_in_batch divides a token_mean, and must "
           "count what the loss weighs: -100 where loss_mask, turn_ids or bounds leave a label out; for another mean "
           "give a normalizer"),
    obeyed(LOSS, "remove_unused_columns label_names", "the columns of the policy loss are in the forward's signature"),
    hosts_own(LOSS, "neftune_noise_alpha", "noise on the embeddings, in front of our head"),
    hosts_own(LOSS, "bf16 fp16 bf16_full_eval fp16_full_eval tf32 accelerator_config",
              "autocast and devices, which our head follows"),
    refused(LOSS, "parallelism_config", None, "it splits labels over ranks, but not the columns of the policy "
            "loss, whose shapes then differ"),
    hosts_own(LOSS, "fsdp fsdp_config deepspeed torch_compile torch_compile_backend torch_compile_mode use_cache",
              "as in `What it cannot do`: no ZeRO-3; a patched call has no cache unless given"),
    hosts_own(RUN,
              "output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
              "warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules "
              "max_grad_norm activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
              "gradient_checkpointing_kwargs liger_kernel_config torch_empty_cache_steps logging_strategy "
              "logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
              "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
              "trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay "
              "prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object "
              "eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy "
              "save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token "
              "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end "
              "metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint "
              "full_determinism seed data_seed use_cpu dataloader_drop_last dataloader_num_workers "
              "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
              "dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy length_column_name "
              "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
              "ddp_timeout debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank",
              "no effect on the loss of a batch"),
)  # fmt: skip
