"""Tiny random networks of every family that vit.py reads, built by the libraries that published them.

Each builder returns (state dict as that library's files have it, reference function from images to outputs, options for
vit.load). make_golden.py keeps them as files; test_parity.py builds them anew.
"""
import re

import torch

SIZE, PATCH, WIDTH, HEADS, HIDDEN, CLASSES = 16, 4, 32, 2, 64, 5


def randomise(model):
    """Every tensor random and far from its usual start, so that a mix-up of any two shows; values that fit into fp16."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 and len(parameter) > 1 else 25  # matrices; else 0.2
            value = torch.randn(parameter.shape, generator=generator) / fan_in ** 0.5 + (1.0 if is_factor(name) else 0.0)
            parameter.copy_(value.half().float())
    return model.eval()


def is_factor(name):
    """LayerNorm's weights and LayerScale's gammas lie about 1."""
    return bool(re.search(r"(norm\w*|ln_\w+|layernorm\w*|layrnorm|layernorm_\w+)\.weight$|gamma$|lambda1$", name))


def timm_vit(**options):
    import timm
    model = timm.models.vision_transformer.VisionTransformer(**{
        "img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "mlp_ratio": HIDDEN / WIDTH,
        "num_classes": CLASSES, **options})
    model = randomise(model)
    return model.state_dict(), model, {"heads": HEADS, "head": True}


def timm_mean():
    return timm_vit(global_pool="avg", class_token=True)


def timm_clip():
    from functools import partial

    import timm
    return timm_vit(pre_norm=True, act_layer=timm.layers.QuickGELU, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))


def timm_dinov2_reg():
    state, model, _ = timm_vit(reg_tokens=4, init_values=1e-5, no_embed_class=True, num_classes=0)
    return state, model, {"heads": HEADS}


def timm_deit_distilled():
    import timm
    model = randomise(timm.models.deit.VisionTransformerDistilled(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=HEADS, mlp_ratio=HIDDEN / WIDTH,
        num_classes=CLASSES))
    return model.state_dict(), lambda images: model.head(model.forward_features(images)[:, 0]), {"heads": HEADS, "head": True}


def facebook_dinov2_reg():
    """DINOv2's own files: `register_tokens`, a position for the class token, a mask token. timm reads them by its filter."""
    import timm
    state, model, options = timm_dinov2_reg()
    first = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1)).half().float() * 0.125
    published = {key: value for key, value in state.items() if key not in ("reg_token", "pos_embed", "cls_token")}
    published |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, WIDTH),
                  "cls_token": (state["cls_token"] - first).half().float(),
                  "pos_embed": torch.cat([first, state["pos_embed"]], dim=1)}
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(published), model))
    return published, model, options


def hugging_face(kind, output, **more):
    """A transformers model as save_pretrained writes it."""
    import tempfile

    import transformers
    from safetensors.torch import load_file
    transformers.logging.set_verbosity_error()
    options = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": SIZE,
               "patch_size": PATCH, "num_labels": CLASSES, **more}
    config_name, model_name = kind
    model = randomise(getattr(transformers, model_name)(getattr(transformers, config_name)(**options)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(f"{folder}/model.safetensors")
    return state, lambda images: output(model(pixel_values=images)), {"heads": HEADS, "head": "Features" not in output.__name__}


def logits(result):
    return result.logits


def embeds(result):
    return result.image_embeds


def pooled_Features(result):  # noqa: N802
    return result.pooler_output


def class_Features(result):  # noqa: N802
    return result.last_hidden_state[:, 0]


def hf_vit():
    return hugging_face(("ViTConfig", "ViTForImageClassification"), logits, intermediate_size=HIDDEN)


def hf_deit():
    return hugging_face(("DeiTConfig", "DeiTForImageClassification"), logits, intermediate_size=HIDDEN)


def hf_dinov2():
    return hugging_face(("Dinov2Config", "Dinov2Model"), class_Features, mlp_ratio=2)


def hf_dinov2_reg():
    return hugging_face(("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"), class_Features, mlp_ratio=2,
                        num_register_tokens=3)


def hf_clip_vision():
    return hugging_face(("CLIPVisionConfig", "CLIPVisionModelWithProjection"), embeds, intermediate_size=HIDDEN,
                        projection_dim=CLASSES)


def hf_clip_vision_features():
    return hugging_face(("CLIPVisionConfig", "CLIPVisionModel"), pooled_Features, intermediate_size=HIDDEN)


def hf_clip_both():
    """CLIPModel: both towers in one file, as openai/clip-vit-base-patch16 has them."""
    import tempfile

    import transformers
    from safetensors.torch import load_file
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": SIZE,
              "patch_size": PATCH, "intermediate_size": HIDDEN}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
            "max_position_embeddings": 6, "eos_token_id": 2}
    model = randomise(transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text,
                                                                     projection_dim=CLASSES)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(f"{folder}/model.safetensors")

    def reference(images):
        return model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
    return state, reference, {"heads": HEADS, "head": True}


def open_clip_openai():
    """OpenAI's own key names, which open_clip has kept: both towers."""
    import open_clip
    vision = open_clip.CLIPVisionCfg(layers=2, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIZE,
                                     mlp_ratio=HIDDEN / WIDTH)
    text = open_clip.CLIPTextCfg(context_length=6, vocab_size=20, width=16, heads=2, layers=1)
    model = randomise(open_clip.CLIP(embed_dim=CLASSES, vision_cfg=vision, text_cfg=text, quick_gelu=True))
    return model.state_dict(), model.encode_image, {"heads": HEADS, "head": True}


def open_clip_timm():
    """open_clip around a timm tower: its keys begin with visual.trunk, the projection is visual.head.proj."""
    import open_clip
    import timm

    def tiny_for_open_clip(pretrained=False, num_classes=0, global_pool="token", img_size=SIZE, **_):
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=img_size, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=HEADS, mlp_ratio=HIDDEN / WIDTH,
            num_classes=num_classes, global_pool=global_pool)
        model.default_cfg = model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return model
    timm.models.register_model(tiny_for_open_clip)
    vision = open_clip.CLIPVisionCfg(timm_model_name="tiny_for_open_clip", timm_pool="token", timm_proj="linear",
                                     image_size=SIZE)
    text = open_clip.CLIPTextCfg(context_length=6, vocab_size=20, width=16, heads=2, layers=1)
    model = randomise(open_clip.CustomTextCLIP(embed_dim=CLASSES, vision_cfg=vision, text_cfg=text))
    return model.state_dict(), model.encode_image, {"heads": HEADS, "head": True}


FAMILIES = {build.__name__: build for build in (
    timm_vit, timm_mean, timm_clip, timm_dinov2_reg, timm_deit_distilled, facebook_dinov2_reg, hf_vit, hf_deit, hf_dinov2,
    hf_dinov2_reg, hf_clip_vision, hf_clip_vision_features, hf_clip_both, open_clip_openai, open_clip_timm)}


def images(count=3):
    """Random images that are the same everywhere and fit into fp16."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)).half().float()
