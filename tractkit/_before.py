"""The modules of before that are packages now or are gone, and the public names of each."""

MODULES = {
    "actors": "",
    "augment": "MIN_PART Pieces Wholes cut_and_turn resampled stored",
    "baselines": "DipySettings choose_dipy_settings previous_direction_loss track_dipy track_oracle",
    "batch": "Provenance StreamlineBatch",
    "batch_draws": (
        "Source apply_at item_key load_by_random_id multiply random_apply sample sample_args unpack_args zip_apply"
    ),
    "batch_flow": "ExpirationPool Iterator Loky Stage Threads combine_batches combine_pad combine_to_arrays",
    "batch_iter": "BatchIter EpochPlan Infinite as_batch_iter",
    "camera": "",
    "card": "state_bytes state_card",
    "checkpoint": (
        "Checkpoints FrozenTree freeze_tree load_checkpoint pack_tree peek_checkpoint save_checkpoint unpack_tree"
    ),
    "cli": "main parser",
    "coloring": "Coloring Legend color_streamlines draw_legend merge_legends palette paste_legends",
    "comet": "CometView export_comet need_comet upload_comet",
    "compose": "",
    "config": "SECTIONS build_trainer check_run_config import_file keywords_of read_run_config read_value",
    "contents": "Connectivity MRIData ReadVolume Rows SFTData find_streamlines find_volume make_streamlines",
    "control": "Control Gate Runner Status Stopped T folder_busy folder_lock runner_of stop_on_interrupt",
    "curves": "RunColumns correlation plot_correlation plot_runs read_run read_runs smooth write_csv",
    "dataset": "MultiSubjectDataset MultisubjectSubset SubjectData",
    "demo": "Demo DemoSettings SubjectFiles check_subject demo_settings demo_trainer open_demo run_demo",
    "describe": "code_version describe_environment describe_model differences make_optimizer",
    "distributed": "launch main_of_agent main_of_worker take_rank torchrun_words write_module",
    "dwi": (
        "DWI Response ShInfo compute_fodf compute_sh estimate_response fodf_peaks largest_sh_order load_dwi load_sh "
        "prepare_subject save_sh select_shell"
    ),
    "edits": "FROM_WHEN apply_change changeable check_changes note_changes take_over",
    "events": "encode_event masked_crc32c scalars_of write_tensorboard",
    "facts": (
        "ACTIVE FolderRun LogFollower VERBS describe_trainer kept_checkpoints pack_curves possible_verbs "
        "settings_code thinned time_left"
    ),
    "feeding": "Feeder",
    "files": "DataError atomic_path cache_folder data_folder",
    "flat": "",
    "form": "EditForm field_text parse_field",
    "functional": (
        "ConsoleLogger ModelTrainer TorchModel inference_step multi_inference_step open_log set_optimizer_params "
        "to_arrays to_tensors train_model train_step training_loss"
    ),
    "hdf5": "HDF5_FORMAT add_subject create_hdf5 group_checksum hdf5_fingerprint open_hdf5 part_ids",
    "hdf5_check": "Finding HDF5Report check_group validate_hdf5",
    "hdf5_tools": "HDF5Description REPAIRS describe_hdf5 extract_hdf5",
    "history": "Columns History",
    "hooks": "Callback HOOKS OnNonFinite TorchSchedule",
    "inputs": "GroupInputs OUTSIDE sample_nearest sample_trilinear",
    "keyed": "KEYED_VERSION fold fold_ids normal permutation random_bits torch_seed uniform",
    "listing": "RunFacts STATUSES differing_settings find_runs read_facts",
    "loader": "BatchLoaderOneInput BatchLoaderSeveralInputs StreamlinesBatchLoader",
    "look": "Readout draw_panel",
    "markup": "Html as_html html_card html_facts html_fold html_table sparkline svg_bars text_table",
    "models.directions": "CosineRegression Targets point_directions previous_directions unit",
    "niivue": "by_color mz3_bytes nifti_bytes trx_bytes",
    "panel": "TrainerLike TrainerPanel panel_of show_trainers_as_panels",
    "phantom": (
        "BUNDLES LAYOUTS Layout PHANTOM_VERSION PhantomSettings PhantomSubject make_phantom sample_subjects "
        "simulate_subject"
    ),
    "plan": "BatchIds Plan Shard cut_batches",
    "plots": (
        "Picture color_ball content_box content_points direction_colors encode_png plot_comparison plot_losses "
        "plot_signal_and_fodf plot_slice plot_streamlines save_figure value_window world_box"
    ),
    "policy": (
        "Constant DecreasingOnPlateau EarlyStopping Exponential LambdaEpoch LoggerPolicy LossStop Patience PerEpoch "
        "Policy Schedule Switch TQDM TimeProfiler ValuePolicy as_value_policy"
    ),
    "post": "Post send_object",
    "preview": "Preview PreviewPicture pack_lines",
    "process": "ProcessRun attach describe_error main_of_process pickled serve_trainer served",
    "ranks": "LostRank RankSampler Ranks",
    "run_cli": "add_run_options config_of_words run_command run_settings",
    "runlog": "Curve RunLog as_log thin_places",
    "runs": "RunBrowser",
    "sampler": "BatchIDSampler NO_GROUP",
    "scene": "Still snapshot vulkan_available",
    "scoring": (
        "BundleScores GroundTruth INVALID_CONNECTION NO_CONNECTION Scores StreamlineClasses TextTable VALID "
        "WRONG_PATH classify_streamlines compare_tractograms comparison_table density_map mdf nearest_mdf score_table "
        "score_tractogram"
    ),
    "session": (
        "ChainedPlan Pace ProgressLine Session Step check_fit check_plan config_mark find_state nothing_left "
        "plan_mark used_memory weighted_mean"
    ),
    "settings": "TrainerSettings amp_type best_device",
    "shorthand": "COMPLETED complete_back complete_run complete_train complete_validate",
    "snags": "OutOfMemory TrainerSnags provenance",
    "sources": (
        "GroupSources SPLITS SplitEntry StreamlinesGroup VolumeGroup find_sources load_config load_connectivity "
        "load_streamlines_group load_volume_group read_config read_splits standardize"
    ),
    "space": "Origin Space apply_affine check_affine conversion_affine convert_points voxel_order voxel_sizes",
    "state": "TrainerState",
    "steps": "TrainerSteps to_device",
    "storage": "ByteCache LocalFile Place chunk_ranges open_unlocked place_of reading",
    "storage_remote": "RemoteFile data_file",
    "streamlines": (
        "PointMap Streamlines compress concatenate_streamlines copy_runs resample_nb_points resample_step reverse "
        "segment_directions split take"
    ),
    "things": (
        "Contour Glyphs Lines Peaks Slices as_glyphs box_of glyph_radii mask_outline may_be_odf peak_sticks "
        "things_to_draw to_world_axes voxels_on_plane"
    ),
    "tracking": "StepModel Tracker TrackingReport check_limits check_seeds dilate_mask seeds_from_mask",
    "tractogram": "Tractogram concatenate_tractograms",
    "trainer": "Trainer TrainerOneInput torch_threads",
    "viewer": "LinkedViews NiivueView View link_views view",
    "views": "FileView epoch_means make_views write_npy_logs",
    "volume": "Neighborhood Volume neighborhood_vectors",
    "weights": "load_best_val load_latest load_weights read_scalars read_weights",
    "words": "ONLY_IN_PYTHON in_words policy_name value_from_words",
}
