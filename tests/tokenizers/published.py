"""Tiny configurations of the published formats, and released-style configurations of FlexTok."""

ENCODER_BLOCKS = ["DownEncoderBlock2D"] * 2
KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32],
    "down_block_types": ENCODER_BLOCKS,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.5,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
VQ = {
    "_class_name": "VQModel",
    "block_out_channels": [8, 8],
    "down_block_types": ENCODER_BLOCKS,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "num_vq_embeddings": 16,
    "vq_embed_dim": 3,
}
LLAMAGEN = {
    "image_size": 16, "channels": 32, "widths": (32, 64), "num_blocks": 1, "z_channels": 32,
    "vocab": 32, "dim": 4,
}  # fmt: skip
TITOK = {
    "image_size": 16, "num_tokens": 4, "token_dim": 4, "vocab": 32, "encoder_dim": 128,
    "encoder_depth": 1, "encoder_patch": 8, "decoder_dim": 64, "decoder_depth": 2,
    "decoder_patch": 2, "proxy_widths": (32, 64), "proxy_blocks": 1, "proxy_vocab": 16,
    "proxy_dim": 8,
}  # fmt: skip
TITOK_PIXELS = {**TITOK, "is_legacy": False, "proxy_widths": (), "decoder_patch": 4}


def _part(where, **args):
    return {"_target_": f"flextok.{where}", **args}


def flextok(dim=32, depth=1, num=4):
    """Sections of a released configuration: latents of 4 channels, 8 x 8, patches of 2 x 2."""
    to_last = {"_target_": "flextok.model.utils.dict_ops.channels_first_to_last", "_partial_": True}
    to_first = {**to_last, "_target_": "flextok.model.utils.dict_ops.channels_last_to_first"}
    op, posemb = "model.utils.dict_ops.PerSampleOp", "model.utils.posembs.PositionalEmbeddingAdder"
    packer = "model.preprocessors.flex_seq_packing.BlockWiseSequencePacker"
    patches = {"channels_in": 4, "dim": dim, "patch_sizes": [2, 2], "flatten_patches": False}
    trunk = {"dim": dim, "depth": depth, "head_dim": 16, "use_act_checkpoint": True}
    encoder = {
        "enc_channels_to_last": _part(
            op, read_key="vae_latents", write_key="latents_bhwc", per_sample_op=to_last
        ),
        "enc_patch_emb": _part(
            "model.preprocessors.patching.PatchEmbedder",
            input_tensor_list_read_key="latents_bhwc", patches_list_write_key="enc_patches",
            n_patches_write_key="enc_n_patches", **patches,
        ),
        "enc_posemb_module": _part(
            posemb, read_key="enc_patches", write_key="enc_patches", dim=dim, max_sizes=[4, 4],
            posemb_type="sincos", posemb_scaling="absolute",
        ),
        "enc_register_module": _part(
            "model.preprocessors.registers.Registers1D",
            input_tensor_list_read_key="enc_patches", registers_write_key="enc_registers",
            register_sizes_read_write_key="register_sizes", dim=dim, n_min=num, n_max=num,
            size_sampling_mode="uniform", ordering_mode="nested",
        ),
        "enc_seq_packer": _part(
            packer, input_list_read_keys=["enc_patches", "enc_registers"],
            packed_seq_write_key="enc_packed", block_mask_write_key="enc_mask",
            inner_packed_shapes_write_key="enc_inner", outer_packed_shapes_write_key="enc_outer",
            mask_mode="causal_last", pad_to_multiple=128,
        ),
        "enc_transformer": _part(
            "model.trunks.transformers.FlexTransformer", input_seq_read_key="enc_packed",
            output_seq_write_key="enc_packed", block_mask_read_key="enc_mask", **trunk,
        ),
        "enc_unpacker": _part(
            "model.postprocessors.seq_unpacking.SequenceUnpacker", packed_seq_read_key="enc_packed",
            inner_seq_write_keys=["enc_patches", "enc_registers"],
            inner_packed_shapes_read_key="enc_inner", outer_packed_shapes_read_key="enc_outer",
        ),
        "enc_to_latents": _part(
            "model.postprocessors.heads.LinearHead", read_key="enc_registers",
            write_key="enc_registers", dim=dim, dim_out=2, use_mup_readout=False,
            weight_init_style="zero", dtype_override=None,
        ),
    }  # fmt: skip
    decoder = {
        "dec_from_latents": _part(
            "model.preprocessors.linear.LinearLayer", read_key="quants", write_key="dec_registers",
            dim_in=2, dim=dim,
        ),
        "dec_registers_posemb_module": _part(
            posemb, read_key="dec_registers", write_key="dec_registers", dim=dim, max_sizes=[num],
            posemb_type="learnable_sum", posemb_scaling="absolute",
        ),
        "dec_nested_dropout": _part(
            "model.preprocessors.token_dropout.MaskedNestedDropout",
            read_write_key="dec_registers", dim=dim, size_sampling_mode="uniform",
        ),
        "dec_latent_dropout": _part(
            "model.preprocessors.nullcond.LearnedNullCond", read_write_key="dec_registers",
            dim=dim, dropout_prob=0.2,
        ),
        "dec_noise_channels_to_last": _part(
            op, read_key="noised", write_key="noised_bhwc", per_sample_op=to_last
        ),
        "dec_noise_patch_emb": _part(
            "model.preprocessors.patching.PatchEmbedder", input_tensor_list_read_key="noised_bhwc",
            patches_list_write_key="dec_patches", n_patches_write_key="dec_n_patches", **patches,
        ),
        "dec_patches_posemb_module": _part(
            posemb, read_key="dec_patches", write_key="dec_patches", dim=dim, max_sizes=[4, 4],
        ),
        "dec_seq_packer": _part(
            packer, input_list_read_keys=["dec_patches", "dec_registers"],
            packed_seq_write_key="dec_packed", block_mask_write_key="dec_mask",
            inner_packed_shapes_write_key="dec_inner", outer_packed_shapes_write_key="dec_outer",
            emb_packing_fn_write_key="packing_fn", mask_mode="full", per_subseq_embs=True,
        ),
        "dec_time_embedder": _part(
            "model.preprocessors.time_embedding.TimestepEmbedder", timesteps_read_key="timesteps",
            time_embedding_write_key="dec_temb", dim=dim, frequency_embedding_size=16,
        ),
        "dec_transformer": _part(
            "model.trunks.transformers.FlexTransformer", input_seq_read_key="dec_packed",
            output_seq_write_key="dec_packed", block_mask_read_key="dec_mask",
            adaLN_emb_read_key="dec_temb", adaLN_packing_fn_read_key="packing_fn",
            adaLN_expansion=2, **trunk,
        ),
        "dec_unpacker": _part(
            "model.postprocessors.seq_unpacking.SequenceUnpacker", packed_seq_read_key="dec_packed",
            inner_seq_write_keys=["dec_patches", "dec_registers"],
            inner_packed_shapes_read_key="dec_inner", outer_packed_shapes_read_key="dec_outer",
        ),
        "dec_to_patches": _part(
            "model.postprocessors.heads.ToPatchesLinearHead", read_key="dec_patches",
            write_key="dec_patches", dim=dim, channels_out=4, patch_sizes=[2, 2],
            use_mup_readout=False, adaLN_emb_read_key="dec_temb",
        ),
        "dec_channels_to_first": _part(
            op, read_key="dec_patches", write_key="reconst", per_sample_op=to_first
        ),
    }  # fmt: skip
    wrapper = "model.utils.wrappers.SequentialModuleDictWrapper"
    return {
        "encoder": _part(wrapper, module_dict=encoder),
        "decoder": _part(wrapper, module_dict=decoder),
        "regularizer": _part(
            "regularizers.quantize_fsq.FSQ", latents_read_key="enc_registers",
            quants_write_key="quants", tokens_write_key="tokens", levels=[8, 5], drop_quant_p=0.0,
        ),
        "pipeline": _part(
            "flow_matching.pipelines.MinRFPipeline", _partial_=True, latents_read_key="quants",
            timesteps_read_key="timesteps", noised_images_read_key="noised",
            reconst_write_key="reconst", out_channels=4,
        ),
        "vae": _part(
            "vae_wrapper.StableDiffusionVAE", images_read_key="rgb",
            vae_latents_read_key="reconst", vae_latents_write_key="vae_latents",
            images_reconst_write_key="rgb_reconst", latent_channels=4, scaling_factor=0.5,
            frozen=True,
        ),
    }  # fmt: skip


FLEXTOK_RELEASED = {**flextok(), "autoencoder": KL, "image_size": 16}
CASES = {
    "diffusers kl": ("diffusers", {"autoencoder": KL, "image_size": 16}),
    "diffusers vq": ("diffusers", {"autoencoder": VQ, "image_size": 16}),
    "llamagen published": ("llamagen_vq", LLAMAGEN),
    "titok published": ("titok_published", TITOK),
    "titok published pixels": ("titok_published", {**TITOK_PIXELS, "unit_length": False}),
    "titok published vae": ("titok_published", {**TITOK_PIXELS, "quantize_mode": "vae"}),
    "flextok released": (
        "flextok_published",
        {**FLEXTOK_RELEASED, "solver": {"num_steps": 2, "guidance_scale": 2.0}},
    ),
}  # fmt: skip
