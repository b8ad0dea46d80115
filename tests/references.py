"""Tiny random networks of every family that vit.py reads, built by the libraries that publish them.

Each builder in FAMILIES returns
    the state dict, as in that library's files,
    a reference function from images to outputs,
    the options that vit.load needs.
make_golden.py writes them to files; test_parity.py builds them again.
"""

import copy
import re
import tempfile
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file

SIZE = 16  # pixels along a side
PATCH = 4
WIDTH = 32
HEADS = 2
HIDDEN = 64  # of the MLP
CLASSES = 5

# The text tower that open_clip requires; no test uses it.
OPEN_CLIP_TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}


def images(count=3, size=SIZE):
    """Random images, the same on every machine, with values that fp16 represents exactly."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, size, size, generator=generator).half().float()


@torch.no_grad()
def randomise(model):
    """Set every tensor to random values far from its initialisation, so that a mix-up shows.

    fp16 represents the values exactly.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.2
        if parameter.ndim > 1 and len(parameter) > 1:  # a matrix
            std = parameter[0].numel() ** -0.5
        value = torch.randn(parameter.shape, generator=generator) * std
        if is_factor(name):
            value += 1
        parameter.copy_(value.half().float())
    return model.eval()


def is_factor(name):
    """Whether the tensor is centred on 1, as LayerNorm weights and LayerScale gammas are."""
    norms = r"(norm\w*|ln|ln_\w+|layernorm\w*|layrnorm|layernorm_\w+)\.weight$"
    return bool(re.search(f"{norms}|gamma(_[12])?$|lambda1$", name))


# ------------------------------------------------------------------------------------------ timm


def timm_vit(**options):
    """A ViT with a classifier; `options` are those of timm's VisionTransformer."""
    import timm

    shape = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
        "num_classes": CLASSES,
    }
    shape |= options
    model = randomise(timm.models.vision_transformer.VisionTransformer(**shape))
    return model.state_dict(), model, {"heads": HEADS, "head": True}


def timm_mean():
    """A ViT whose head reads the mean of the patch tokens."""
    return timm_vit(global_pool="avg", class_token=True)


def timm_clip():
    """CLIP's image tower."""
    import timm

    norm = partial(torch.nn.LayerNorm, eps=1e-5)
    return timm_vit(pre_norm=True, act_layer=timm.layers.QuickGELU, norm_layer=norm)


def timm_dinov2_reg():
    """DINOv2 with registers."""
    state, model, _ = timm_vit(reg_tokens=4, init_values=1e-5, no_embed_class=True, num_classes=0)
    return state, model, {"heads": HEADS}


def timm_deit_distilled():
    """DeiT with a distillation token; the reference reads the class token alone."""
    import timm

    model = timm.models.deit.VisionTransformerDistilled(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=CLASSES,
    )
    model = randomise(model)

    def reference(images):
        tokens = model.forward_features(images)
        return model.head(tokens[:, 0])

    return model.state_dict(), reference, {"heads": HEADS, "head": True}


def facebook_dinov2_reg():
    """DINOv2's own files, which timm's filter translates.

    They call registers `register_tokens`, give the class token a position, and hold a mask token.
    """
    import timm

    state, model, options = timm_dinov2_reg()
    first = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    first = first.half().float() * 0.125  # the class token's position
    published = dict(state)
    published["register_tokens"] = published.pop("reg_token")
    published["mask_token"] = torch.zeros(1, WIDTH)
    published["cls_token"] = (state["cls_token"] - first).half().float()
    published["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    to_timm = timm.models.vision_transformer.checkpoint_filter_fn
    model.load_state_dict(to_timm(dict(published), model))
    return published, model, options


def timm_dinov3(qkv_bias=False):
    """DINOv3 as timm publishes it, by default without a bias for queries, keys and values."""
    import timm

    norm = partial(torch.nn.LayerNorm, eps=1e-5)
    model = timm.models.eva.Eva(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=0,
        global_pool="token",
        qkv_bias=qkv_bias,
        init_values=1e-5,
        norm_layer=norm,
        use_fc_norm=False,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        dynamic_img_size=True,
    )
    model = randomise(model)
    return model.state_dict(), model, {"heads": HEADS, "image_size": SIZE}


def timm_dinov3_qkvb():
    """timm's DINOv3 with a bias for queries and values."""
    return timm_dinov3(qkv_bias=True)


def facebook_dinov3():
    """DINOv3's own files, which timm's filter translates; the bias of the keys is masked."""
    import timm

    state, model, options = timm_dinov3(qkv_bias=True)
    published = {"mask_token": torch.zeros(1, WIDTH)}
    published["rope_embed.periods"] = 100 ** torch.linspace(0, 0.75, 4).bfloat16()
    renames = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    for key, value in state.items():
        for old, new in renames.items():
            key = key.replace(old, new)
        published[key] = value
    ones = torch.ones(WIDTH)
    for i in range(2):
        block = f"blocks.{i}.attn"
        q_bias = published.pop(f"{block}.q_bias")
        v_bias = published.pop(f"{block}.v_bias")
        published[f"{block}.qkv.bias"] = torch.cat([q_bias, ones, v_bias])
        published[f"{block}.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
    model.load_state_dict(timm.models.eva.checkpoint_filter_fn(dict(published), model))
    return published, model, options


def timm_beit():
    """BEiT's blocks with absolute positions, gammas, and biases for queries and values only."""
    import timm

    model = timm.models.beit.Beit(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=CLASSES,
        use_abs_pos_emb=True,
        init_values=0.1,
    )
    model = randomise(model)
    return model.state_dict(), model, {"heads": HEADS, "head": True}


# ---------------------------------------------------------------------------------------- Google


def google_vit():
    """Google's ViT with the names and shapes of its .npz, which timm reads into another network."""
    state, model, options = timm_vit()
    published = as_google(state, attention=1, mlp=3, norm2=2)
    published["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    return published, read_by_timm(published, model), {"head": True}


def google_big_vision():
    """big_vision's layout: other module numbers, all blocks in one array, no position for the class
    token."""
    state, model, options = timm_vit(no_embed_class=True)
    published = {}
    blocks = {}
    for name, value in as_google(state, attention=0, mlp=0, norm2=1).items():
        _, number, rest = re.fullmatch(r"(.*encoderblock_(\d)/)?(.*)", name).groups()
        if number is None:
            published[f"params/{rest}"] = value
        else:
            blocks.setdefault(rest, []).append(value)
    for name, values in blocks.items():
        published[f"params/Transformer/encoderblock/{name}"] = torch.stack(values)
    published["params/pos_embedding"] = state["pos_embed"]
    return published, read_by_timm(published, model), {"head": True}


def as_google(state, *, attention, mlp, norm2):
    """The tensors of timm's ViT except its positions, as flax names and orders them.

    Args:
        attention, mlp, norm2: the numbers of these modules in a block.
    """
    published = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", f"LayerNorm_{norm2}")):
            published[f"{block}/{theirs}/scale"] = state[f"blocks.{i}.{ours}.weight"]
            published[f"{block}/{theirs}/bias"] = state[f"blocks.{i}.{ours}.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            weight = state[f"blocks.{i}.mlp.{ours}.weight"]
            published[f"{block}/MlpBlock_{mlp}/{theirs}/kernel"] = weight.T
            published[f"{block}/MlpBlock_{mlp}/{theirs}/bias"] = state[
                f"blocks.{i}.mlp.{ours}.bias"
            ]
        name = f"{block}/MultiHeadDotProductAttention_{attention}"
        weights = state[f"blocks.{i}.attn.qkv.weight"].chunk(3)
        biases = state[f"blocks.{i}.attn.qkv.bias"].chunk(3)
        for each, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            published[f"{name}/{each}/kernel"] = weight.T.reshape(WIDTH, HEADS, -1)
            published[f"{name}/{each}/bias"] = bias.reshape(HEADS, -1)
        weight = state[f"blocks.{i}.attn.proj.weight"]
        published[f"{name}/out/kernel"] = weight.T.reshape(HEADS, -1, WIDTH)
        published[f"{name}/out/bias"] = state[f"blocks.{i}.attn.proj.bias"]
    return published


def read_by_timm(published, model):
    """A copy of the network that timm's own reader of .npz has filled with these tensors."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    with tempfile.TemporaryDirectory() as folder:
        arrays = {name: value.numpy() for name, value in published.items()}
        np.savez(f"{folder}/w.npz", **arrays)
        copied.load_pretrained(f"{folder}/w.npz")
    return copied


# ----------------------------------------------------------------------------------- torchvision


def torchvision_vit():
    """torchvision's ViT with its classifier."""
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=SIZE,
        patch_size=PATCH,
        num_layers=2,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        mlp_dim=HIDDEN,
        num_classes=CLASSES,
    )
    model = randomise(model)
    return model.state_dict(), model, {"heads": HEADS, "head": True}


# ---------------------------------------------------------------------------------- transformers


def hugging_face(config_name, model_name, **more):
    """A model of transformers and the tensors that its save_pretrained writes."""
    import transformers

    transformers.logging.set_verbosity_error()
    options = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
        "num_labels": CLASSES,
    }
    options |= more
    config = getattr(transformers, config_name)(**options)
    model = randomise(getattr(transformers, model_name)(config))
    return saved_state(model), model


def saved_state(model):
    """The tensors of the file that save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def hf_vit():
    """ViT with a classifier."""
    state, model = hugging_face("ViTConfig", "ViTForImageClassification", intermediate_size=HIDDEN)

    def reference(images):
        return model(pixel_values=images).logits

    return state, reference, {"heads": HEADS, "head": True}


def hf_deit():
    """DeiT with a classifier."""
    state, model = hugging_face(
        "DeiTConfig", "DeiTForImageClassification", intermediate_size=HIDDEN
    )

    def reference(images):
        return model(pixel_values=images).logits

    return state, reference, {"heads": HEADS, "head": True}


def hf_deit_distilled():
    """DeiT with both classifiers; the reference reads the class token's alone."""
    name = "DeiTForImageClassificationWithTeacher"
    state, model = hugging_face("DeiTConfig", name, intermediate_size=HIDDEN)

    def reference(images):
        return model.deit(pixel_values=images).last_hidden_state[:, 0]

    return state, reference, {"heads": HEADS}


def hf_dinov2():
    """DINOv2 without a head."""
    state, model = hugging_face("Dinov2Config", "Dinov2Model", mlp_ratio=2)

    def reference(images):
        return model(pixel_values=images).last_hidden_state[:, 0]

    return state, reference, {"heads": HEADS, "head": False}


def hf_dinov2_reg():
    """DINOv2 with registers, without a head."""
    state, model = hugging_face(
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        mlp_ratio=2,
        num_register_tokens=3,
    )

    def reference(images):
        return model(pixel_values=images).last_hidden_state[:, 0]

    return state, reference, {"heads": HEADS, "head": False}


def hf_dinov3():
    """DINOv3 without a head; its keys have no bias."""
    state, model = hugging_face(
        "DINOv3ViTConfig", "DINOv3ViTModel", intermediate_size=HIDDEN, num_register_tokens=4
    )

    def reference(images):
        return model(pixel_values=images).last_hidden_state[:, 0]

    return state, reference, {"heads": HEADS, "image_size": SIZE}


def hf_clip_vision():
    """CLIP's image tower with its projection."""
    state, model = hugging_face(
        "CLIPVisionConfig",
        "CLIPVisionModelWithProjection",
        intermediate_size=HIDDEN,
        projection_dim=CLASSES,
    )

    def reference(images):
        return model(pixel_values=images).image_embeds

    return state, reference, {"heads": HEADS, "head": True}


def hf_clip_vision_features():
    """CLIP's image tower without projection."""
    state, model = hugging_face("CLIPVisionConfig", "CLIPVisionModel", intermediate_size=HIDDEN)

    def reference(images):
        return model(pixel_values=images).pooler_output

    return state, reference, {"heads": HEADS, "head": False}


def hf_clip_both():
    """CLIPModel: both towers in one file, as in openai/clip-vit-base-patch16."""
    import transformers

    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
        "intermediate_size": HIDDEN,
    }
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
        "max_position_embeddings": 6,
        "eos_token_id": 2,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=CLASSES)
    model = randomise(transformers.CLIPModel(config))

    def reference(images):
        features = model.vision_model(pixel_values=images).pooler_output
        return model.visual_projection(features)

    return saved_state(model), reference, {"heads": HEADS, "head": True}


# ------------------------------------------------------------------------------------- open_clip


def open_clip_openai():
    """Both towers under OpenAI's own key names, which open_clip has kept."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(
        layers=2,
        width=WIDTH,
        head_width=WIDTH // HEADS,
        patch_size=PATCH,
        image_size=SIZE,
        mlp_ratio=HIDDEN / WIDTH,
    )
    text = open_clip.CLIPTextCfg(**OPEN_CLIP_TEXT)
    model = open_clip.CLIP(embed_dim=CLASSES, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    model = randomise(model)
    return model.state_dict(), model.encode_image, {"heads": HEADS, "head": True}


def open_clip_timm():
    """open_clip around a tower of timm: its keys begin with visual.trunk and visual.head.proj."""
    import open_clip
    import timm

    def tiny_for_open_clip(
        pretrained=False, num_classes=0, global_pool="token", img_size=SIZE, **_
    ):
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=img_size,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=2,
            num_heads=HEADS,
            mlp_ratio=HIDDEN / WIDTH,
            num_classes=num_classes,
            global_pool=global_pool,
        )
        norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), **norm}
        model.default_cfg = model.pretrained_cfg
        return model

    timm.models.register_model(tiny_for_open_clip)
    vision = open_clip.CLIPVisionCfg(
        timm_model_name="tiny_for_open_clip",
        timm_pool="token",
        timm_proj="linear",
        image_size=SIZE,
    )
    text = open_clip.CLIPTextCfg(**OPEN_CLIP_TEXT)
    model = open_clip.CustomTextCLIP(embed_dim=CLASSES, vision_cfg=vision, text_cfg=text)
    model = randomise(model)
    return model.state_dict(), model.encode_image, {"heads": HEADS, "head": True}


BUILDERS = (
    timm_vit,
    timm_mean,
    timm_clip,
    timm_dinov2_reg,
    timm_deit_distilled,
    timm_beit,
    google_vit,
    google_big_vision,
    torchvision_vit,
    facebook_dinov2_reg,
    timm_dinov3,
    timm_dinov3_qkvb,
    facebook_dinov3,
    hf_vit,
    hf_deit,
    hf_deit_distilled,
    hf_dinov2,
    hf_dinov2_reg,
    hf_dinov3,
    hf_clip_vision,
    hf_clip_vision_features,
    hf_clip_both,
    open_clip_openai,
    open_clip_timm,
)
FAMILIES = {build.__name__: build for build in BUILDERS}
