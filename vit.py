"""The Vision Transformer: the network that stays frozen, and the loaders of its pretrained weights.

An image is cut into N square patches, each patch becomes a token of width D, a class token (and perhaps R register
tokens) joins them, and L equal blocks follow (ViT, https://arxiv.org/abs/2010.11929, equations 1 to 4):

    h_0 = [class; registers; patches] + positions
    h   <- h + Attention(LayerNorm(h))        every token looks at every other
    h   <- h + MLP(LayerNorm(h))              every token by itself
    logits = W · LayerNorm(h_L)[class]        or of the mean of the patch tokens

Shapes: B images, N tokens, D width, H heads, R registers, L blocks.

Module names are timm's (https://github.com/huggingface/pytorch-image-models), because most published files use them; the
other layouts are translated by the table LAYOUTS. Loading is strict: each tensor must be found with its right shape and
none may be left over, so that a network is either the pretrained one or an error.
"""
import json
import math
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Config:
    """All that fixes the shape and the function of a ViT, apart from its weights.

    `hidden` is the MLP's width; 0 stands for the usual 4·D. `pool` says what the head reads: "token" is
    norm(h)[class], "mean" is norm(mean of the patch tokens) (timm's `fc_norm`). `norm_pre`, `quick_gelu` and
    `patch_bias=False` are CLIP's; `layer_scale` and `registers` DINOv2's (https://arxiv.org/abs/2309.16588). `causal` is
    text: each token looks at itself and earlier ones only; a text's `patch` is 1 and its `image_size` the number of tokens.
    """
    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    hidden: int = 0
    registers: int = 0
    layer_scale: bool = False
    norm_pre: bool = False
    quick_gelu: bool = False
    qkv_bias: bool = True
    patch_bias: bool = True
    pool: str = "token"
    eps: float = 1e-6
    causal: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} can't be split into {self.heads} heads; give the number by --heads")
        if self.image_size % self.patch:
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch size {self.patch}")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation that OpenAI trained CLIP with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # three of [B, H, N, D/H]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, H, N, D/H]
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.hidden or 4 * config.width
        self.fc1 = nn.Linear(config.width, hidden)
        self.act = QuickGELU() if config.quick_gelu else nn.GELU()
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm transformer block. `adapter`, if something was put there, is a map [B, N, D] to [B, N, D] whose result is
    added at the end; its attribute `reads` says what it reads. `prompts` [P, D] are tokens that join (see ViT.features)."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.adapter: nn.Module | None = None
        self.prompts: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        z = self.norm2(x)
        y = self.ls2(self.mlp(z))
        h = x + y
        return h if self.adapter is None else h + self.adapter({"block": h, "raw": x, "ln": z, "mlp": y}[self.adapter.reads])


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each: a convolution whose stride is its kernel."""

    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=config.patch_bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, D, g, g] -> [B, g·g, D]


class ViT(nn.Module):
    """Images [B, 3, S, S], normalised, to logits [B, classes]; to features [B, D] when `classes` is 0."""

    def __init__(self, config: Config, classes: int = 0):
        super().__init__()
        self.config, D = config, config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid ** 2, D))
        self.norm_pre = nn.LayerNorm(D, eps=config.eps) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=config.eps)
        self.head = nn.Linear(D, classes) if classes else nn.Identity()

    def init_weights(self) -> None:
        """Random weights to train from nothing (timm's choice: truncated normal of 0.02, biases 0)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tokens in (self.cls_token, self.reg_token, self.pos_embed):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Images to the tokens [B, 1+R+g·g, D] that enter the first block. Registers have no position."""
        B = images.shape[0]  # not len(), which torch.export would take for a constant
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        first = [(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)]
        if self.reg_token is not None:
            first.append(self.reg_token.expand(B, -1, -1))
        return self.norm_pre(torch.cat([*first, patches], dim=1))

    def features(self, images: Tensor) -> Tensor:
        """Images to what the head reads, [B, D]. A block's prompts come after the N own tokens, in place of earlier ones."""
        x = self.embed(images)
        B, N, _ = x.shape
        for block in self.blocks:
            if block.prompts is not None:
                x = torch.cat([x[:, :N], block.prompts.expand(B, -1, -1)], dim=1)
            x = block(x)
        return self.norm(x[:, 0] if self.config.pool == "token" else x[:, 1 + self.config.registers:N].mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class TextTower(nn.Module):
    """CLIP's text side: token ids int64 [K, N] to embeddings [K, E]. The head reads the token at the end-of-text mark, told by
    its id, the highest; Hugging Face's rule, the first `eos_token_id`, differs only where tokens were added after it."""

    def __init__(self, config: Config, vocabulary: int, classes: int):
        super().__init__()
        self.token_embed = nn.Embedding(vocabulary, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(config.grid, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, classes, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.token_embed(ids) + self.pos_embed[:ids.shape[1]])  # [K, N, D]
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)]))


# ------------------------------------------------------------------------------------------- the pretrained backbones

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


@dataclass(frozen=True)
class Backbone:
    """A pretrained network: its shape, its input, and the Hugging Face repository that publishes it under `license`. `norm` is
    (mean, std) per channel for pixels in 0..1 and belongs to the backbone: with a wrong one it still works, only worse, which
    is why nobody is asked to remember it. All of them were trained on images resized bicubically."""
    repo: str
    config: Config
    norm: tuple = IMAGENET
    license: str = "Apache-2.0"

    def at(self, image_size: int) -> "Backbone":
        """The same for images of another size in pixels; 0 for its own."""
        return replace(self, config=replace(self.config, image_size=image_size or self.config.image_size))


def _vit(width: int, patch: int, image_size: int = 224, **more) -> Config:
    """The field's common shapes: 12 blocks (24 from width 1024 on) and heads of 64 channels."""
    return Config(**{"width": width, "depth": 24 if width == 1024 else 12, "heads": width // 64, "patch": patch,
                     "image_size": image_size, **more})


_DINOV2, _REG = {"layer_scale": True}, {"layer_scale": True, "registers": 4}
_LAION = {"norm_pre": True, "patch_bias": False, "eps": 1e-5}
_CLIP = _LAION | {"quick_gelu": True}

# Repositories, normalisation and license as in timm's registry (default_cfgs, timm 1.0), CLIP's as in OpenAI's clip.py and, for
# LAION's, open_clip's. DINOv2 was published for 518 px; 224 is what most use it at (--image-size 518 for the original).
BACKBONES = {
    "vit_ti16": Backbone("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", _vit(192, 16), HALF),
    "vit_s16": Backbone("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", _vit(384, 16), HALF),
    "vit_b16": Backbone("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", _vit(768, 16), HALF),
    "vit_l16": Backbone("timm/vit_large_patch16_224.augreg_in21k_ft_in1k", _vit(1024, 16), HALF),
    "deit_ti16": Backbone("timm/deit_tiny_patch16_224.fb_in1k", _vit(192, 16)),
    "deit_s16": Backbone("timm/deit_small_patch16_224.fb_in1k", _vit(384, 16)),
    "deit_b16": Backbone("timm/deit_base_patch16_224.fb_in1k", _vit(768, 16)),
    "dino_s16": Backbone("timm/vit_small_patch16_224.dino", _vit(384, 16)),
    "dino_b16": Backbone("timm/vit_base_patch16_224.dino", _vit(768, 16)),
    "dinov2_s14": Backbone("timm/vit_small_patch14_dinov2.lvd142m", _vit(384, 14, **_DINOV2)),
    "dinov2_b14": Backbone("timm/vit_base_patch14_dinov2.lvd142m", _vit(768, 14, **_DINOV2)),
    "dinov2_l14": Backbone("timm/vit_large_patch14_dinov2.lvd142m", _vit(1024, 14, **_DINOV2)),
    "dinov2_s14_reg": Backbone("timm/vit_small_patch14_reg4_dinov2.lvd142m", _vit(384, 14, **_REG)),
    "dinov2_b14_reg": Backbone("timm/vit_base_patch14_reg4_dinov2.lvd142m", _vit(768, 14, **_REG)),
    "dinov2_l14_reg": Backbone("timm/vit_large_patch14_reg4_dinov2.lvd142m", _vit(1024, 14, **_REG)),
    "mae_b16": Backbone("timm/vit_base_patch16_224.mae", _vit(768, 16), license="CC-BY-NC-4.0"),
    "clip_b32": Backbone("openai/clip-vit-base-patch32", _vit(768, 32, **_CLIP), CLIP, license="MIT"),
    "clip_b16": Backbone("openai/clip-vit-base-patch16", _vit(768, 16, **_CLIP), CLIP, license="MIT"),
    "clip_l14": Backbone("openai/clip-vit-large-patch14", _vit(1024, 14, **_CLIP), CLIP, license="MIT"),
    "clip_b32_laion": Backbone("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", _vit(768, 32, **_LAION), CLIP, license="MIT"),
    "clip_b16_laion": Backbone("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", _vit(768, 16, **_LAION), CLIP, license="MIT"),
    "clip_l14_laion": Backbone("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _vit(1024, 14, **_LAION), HALF, license="MIT"),
    # Ours, in assets/: pretrained on CIFAR-100 by train.py --scratch, the commands and their log beside it.
    "vit_micro": Backbone("", _vit(128, 4, 32, depth=6, heads=4, hidden=256, pool="mean"), CIFAR100, license="MIT"),
}

# ------------------------------------------------------------------------------------------ reading published weights


# A family of files is told by a key that only it has, given here by its end. What stands before that end is a prefix: it is
# stripped from all keys, and those without it are marked by "../". Then come the LayerNorms' eps, which no file states, and
# the parts that are known not to belong to an image backbone; whatever else is left over is an error.
LAYOUTS = {
    "OpenAI CLIP, open_clip": (r"\bconv1\.weight$", 1e-5, r"\.\./(transformer\.|token_embedding\.|positional_embedding$|"
                               r"ln_final\.|text|logit_|attn_mask$|input_resolution$|context_length$|vocab_size$)"),
    "Hugging Face CLIP": (r"\bembeddings\.class_embedding$", 1e-5,
                          r"(.*\.)?embeddings\.position_ids$|\.\./(text_|logit_scale$)"),
    "Hugging Face Dinov2": (r"\bencoder\.layer\.0\.layer_scale1\.lambda1$", 1e-6, r"embeddings\.mask_token$"),
    "Hugging Face ViT, DeiT": (r"\b(encoder\.layer|layers)\.0\.layernorm_before\.weight$", 1e-12,
                               r"pooler\.|embeddings\.mask_token$|\.\./(decoder\.|(cls|distillation)_classifier\.)"),
    "timm, DeiT, DINO, DINOv2, MAE": (r"\bpatch_embed\.proj\.weight$", 1e-6, r"mask_token$|decoder_|head_dist\.|"
                                      r"(\.\./)?head\.(mlp|last_layer)|\.\./(text|logit_)"),
}
TEXT = {"OpenAI, open_clip, Hugging Face CLIP": (  # the same for CLIP's text tower
    r"\b(embeddings\.)?token_embedding\.weight$", 1e-5, r"(\.\./)?(visual|vision_model\.|logit_|attn_mask$|"
    r"input_resolution$|context_length$|vocab_size$)|embeddings\.position_ids$")}
# Regular expressions that lead to timm's names, applied in order to every key of every family.
RENAMES = {
    r"^(\.\./)?(classifier|text_projection)\.|^\.\./(visual_projection|visual\.head\.proj)\.": "head.",
    r"^(proj|text_projection)$": "head.weight.T", r"^(embeddings\.)?token_embedding\.": "token_embed.",
    r"^(embeddings\.)?class_embedding$|^embeddings\.cls_token$": "cls_token", r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"^positional_embedding$|^embeddings\.position_embedding(\.weight|s)$": "pos_embed",
    r"^(embeddings\.)?(register_tokens|distillation_token)$|^dist_token$": "reg_token",
    r"^(conv1|embeddings\.patch_embeddings\.projection|embeddings\.patch_embedding)\.": "patch_embed.proj.",
    r"^(ln_pre|pre_layrnorm)\.": "norm_pre.", r"^(ln_post|ln_final|post_layernorm|final_layer_norm|layernorm)\.": "norm.",
    r"^(encoder\.layers?|layers|transformer\.resblocks)\.": "blocks.", r"\.attn\.in_proj_": ".attn.qkv.",
    r"\.(ln_|layer_norm)([12])\.": r".norm\2.", r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.",
    r"\.(self_attn|attention(?:\.attention)?)\.([qkv])(uery|ey|alue|_proj)\.": r".attn.\2.",
    r"\.(self_attn\.out_proj|attention\.(output\.dense|o_proj)|attn\.out_proj)\.": ".attn.proj.",
    r"\.(mlp\.c_fc|intermediate\.dense)\.": ".mlp.fc1.", r"\.(mlp\.c_proj|output\.dense)\.": ".mlp.fc2.",
}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a safetensors or `.pth` file, and the JSON that train.py leaves in a safetensors header (or {}).

    A `.pth` is read with `weights_only=True`: one that would run code is refused. Wrappers such as {"model": …} are opened.

    Raises:
        ValueError: the file is missing, truncated, of another format, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("adaptertune", "{}"))
                return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 (not a dict)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, or is no PyTorch file: refused, since a pickle can run code; "
                         "save its state_dict as safetensors") from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or cut short ({reason}); fetch it again") from error
    while isinstance(tensors, dict):
        inner = [tensors[name] for name in ("model", "state_dict", "teacher") if isinstance(tensors.get(name), dict)]
        if not inner:
            return {key: value for key, value in tensors.items() if isinstance(value, Tensor)}, {}
        tensors = inner[0]
    raise ValueError(f"{path} holds no dictionary of tensors")


def to_timm(tensors: dict[str, Tensor], layouts: dict = LAYOUTS) -> tuple[dict[str, Tensor], float]:
    """Translate a published state dict of any of `layouts` to timm's names and this file's shapes, and give its eps.

    Query, key and value are stacked to `qkv`; positions become [1, 1+g·g, D] (class token, patches). A position that a
    file has for its registers, or for DeiT's distillation token, is added into those tokens, which is the same function.

    Raises:
        ValueError: no layout fits.
    """
    for tell, eps, ignored in layouts.values():  # noqa: B007 (used after the break)
        if prefixes := [key[:match.start()] for key in tensors if (match := re.search(tell, key))]:
            break
    else:
        raise ValueError(f"not a ViT in a known layout ({'; '.join(layouts)}): "
                         f"its tensors begin with {', '.join(list(tensors)[:3]) or 'nothing'}")
    found, prefix = {}, prefixes[0]
    for key, value in tensors.items():
        key = key[len(prefix):] if key.startswith(prefix) else "../" + key
        if re.match(ignored, key):
            continue
        for pattern, name in RENAMES.items():
            key = re.sub(pattern, name, key)
        found[key.removesuffix(".T")] = value.float().T.contiguous() if key.endswith(".T") else value.float()
    for q in [key for key in found if ".attn.q." in key]:
        k, v = q.replace(".q.", ".k."), q.replace(".q.", ".v.")
        if k in found and v in found:
            found[q.replace(".q.", ".qkv.")] = torch.cat([found.pop(q), found.pop(k), found.pop(v)])
    if "cls_token" in found and "pos_embed" in found:
        _normal_positions(found)
    return found, eps


def _normal_positions(found: dict[str, Tensor]) -> None:
    """Bring class token and positions to [1, 1, D] and [1, 1+g·g, D], whatever the file counts among the positions."""
    D = found["cls_token"].shape[-1]
    found["cls_token"], positions = found["cls_token"].reshape(1, 1, D), found["pos_embed"].reshape(1, -1, D)
    registers = found["reg_token"].shape[1] if "reg_token" in found else 0
    rows = positions.shape[1]
    extra = next((n for n in (1, 1 + registers, 0) if rows > n and math.isqrt(rows - n) ** 2 == rows - n), 1)
    if extra == 0:  # timm's DINOv2 with registers: the class token's position is already in the token
        positions = torch.cat([torch.zeros(1, 1, D), positions], dim=1)
    elif extra > 1:
        found["reg_token"] = found["reg_token"] + positions[:, 1:extra]
        positions = torch.cat([positions[:, :1], positions[:, extra:]], dim=1)
    found["pos_embed"] = positions


def infer_config(found: dict[str, Tensor], *, eps: float, heads: int = 0) -> Config:
    """The architecture of a translated state dict. What shapes can't tell is assumed: heads of 64 channels unless
    `heads` is given, and OpenAI's QuickGELU where there is a `norm_pre` (CLIP) or the tower is CLIP's for text.

    Raises:
        ValueError: a tensor that every ViT has is missing, or the number of heads can't be guessed.
    """
    text, norm_pre = "token_embed.weight" in found, "norm_pre.weight" in found
    needed = (*(["head.weight"] if text else ["cls_token", "patch_embed.proj.weight"]),
              "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight")
    if missing := [key for key in needed if key not in found]:
        raise ValueError(f"not a whole {'text tower' if text else 'ViT'}: missing {', '.join(missing)}")
    (tokens, width), hidden = found["pos_embed"].shape[-2:], len(found["blocks.0.mlp.fc1.weight"])
    patch, grid = (1, tokens) if text else (found["patch_embed.proj.weight"].shape[-1], math.isqrt(tokens - 1))
    if not heads and width % 64:
        raise ValueError(f"width {width} is no multiple of the usual head width 64; give the number of heads by --heads")
    return Config(
        width=width, heads=heads or width // 64, patch=patch, hidden=0 if hidden == 4 * width else hidden,
        depth=1 + max(int(key.split(".")[1]) for key in found if key.startswith("blocks.")),
        image_size=patch * grid, eps=1e-5 if norm_pre else eps, causal=text,
        registers=found["reg_token"].shape[1] if "reg_token" in found else 0,
        layer_scale="blocks.0.ls1.gamma" in found, norm_pre=norm_pre, quick_gelu=norm_pre or text,
        qkv_bias="blocks.0.attn.qkv.bias" in found, patch_bias="patch_embed.proj.bias" in found,
        pool="mean" if "fc_norm.weight" in found else "token")


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions [1, 1+g·g, D] for a grid of `grid`² patches: bicubic, antialiased, fp32; the class token's is kept."""
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    patches = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def load(path: str | Path, *, name: str = "", image_size: int = 0, heads: int = 0, head: bool = False) -> tuple[ViT, Backbone]:
    """A pretrained ViT from a file, in eval mode, and what it expects of its input.

    Args:
        name: a key of BACKBONES; then the file must have that shape. Without it the shape is read off the file, and the
            normalisation is what the file states, else CLIP's for a CLIP tower, else ImageNet's.
        image_size: pixels along one side, if not the backbone's own; positions are resized to it.
        heads: attention heads, if they aren't 64 channels wide.
        head: keep the file's own classifier (or CLIP's projection) instead of returning features [B, D].

    Raises:
        ValueError: an unreadable file; missing, left-over or misshapen tensors, each of them named.
    """
    tensors, meta = read_tensors(path)
    try:
        found, eps = to_timm(tensors)
        backbone = BACKBONES.get(name)
        if not name:
            config = Config(**meta["config"]) if "config" in meta else infer_config(found, eps=eps, heads=heads)
            norm = (meta["mean"], meta["std"]) if "mean" in meta else CLIP if config.norm_pre else IMAGENET
            backbone = Backbone("", config, norm, license=meta.get("license", "not stated"))
        backbone = backbone.at(image_size)
        config = backbone.config
        found = {key.replace("fc_norm.", "norm.") if config.pool == "mean" else key: value for key, value in found.items()
                 if head or not key.startswith("head.")}
        if "pos_embed" in found:
            found["pos_embed"] = resize_positions(found["pos_embed"], config.grid)
        with torch.device("meta"):  # no memory, no random numbers: what the file doesn't fill can't be used
            model = ViT(config)
            if "head.weight" in found:
                model.head = nn.Linear(config.width, len(found["head.weight"]), bias="head.bias" in found)
        check_tensors(model.state_dict(), found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.load_state_dict(found, assign=True)
    return model.eval(), backbone


def load_text(path: str | Path, *, heads: int = 0, quick_gelu: bool = True) -> tuple[TextTower, float]:
    """CLIP's text tower from a file, in eval mode, and the factor exp(logit_scale) of its cosines (100 if none is stated).
    Whether OpenAI's QuickGELU is in it no file tells; it is in both towers or in none.

    Raises:
        ValueError: an unreadable file or one without a text tower; missing, left-over or misshapen tensors, each named.
    """
    tensors, _ = read_tensors(path)
    if not any(key.endswith("token_embedding.weight") for key in tensors):
        raise ValueError(f"{path} has no text tower of CLIP; give a file with both towers, or use --classifier prototypes")
    try:
        found, eps = to_timm(tensors, TEXT)
        config = replace(infer_config(found, eps=eps, heads=heads), quick_gelu=quick_gelu)
        with torch.device("meta"):
            model = TextTower(config, len(found["token_embed.weight"]), len(found["head.weight"]))
        check_tensors(model.state_dict(), found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.load_state_dict(found, assign=True)
    scale = [value.item() for key, value in tensors.items() if key.removeprefix("module.") == "logit_scale"]
    return model.eval(), math.exp(scale[0]) if scale else 100.0


def check_tensors(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise a ValueError that names what is missing, left over or of another shape; return if all agree."""
    faults = [("missing", [key for key in wanted if key not in found]),
              ("left over", [key for key in found if key not in wanted]),
              ("of another shape", [f"{key} {tuple(found[key].shape)}, not {tuple(wanted[key].shape)}"
                                    for key in wanted if key in found and found[key].shape != wanted[key].shape])]
    if texts := [f"{len(keys)} {fault}: {', '.join(keys[:3])}{' …' * (len(keys) > 3)}" for fault, keys in faults if keys]:
        raise ValueError("; ".join(texts))
