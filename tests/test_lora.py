"""--init-lora: LoRAs made by peft itself, merged by vit.py, compared with peft's own logits."""

import json
import re

import onnxruntime
import pytest
import references
import torch
from conftest import runner, write_tiny
from safetensors.torch import load_file, save_file

import adaptertune
import export
import train
import vit

peft = pytest.importorskip("peft")

LIMIT = 1e-4
CLASSES = 10  # of the digits
SHAPE = {
    "hidden_size": references.WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": references.HEADS,
    "intermediate_size": references.HIDDEN,
    "image_size": references.SIZE,
    "patch_size": references.PATCH,
}
# The names that transformers gave the modules before version 5.
OLDER = {
    r"\.layers\.": ".encoder.layer.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}


# ------------------------------------------------------------------------------- made by others


def hf_vit(labels=CLASSES):
    """A random ViTForImageClassification of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**SHAPE, num_labels=labels)
    return references.randomise(transformers.ViTForImageClassification(config))


def timm_vit(**options):
    """A random timm VisionTransformer."""
    pytest.importorskip("timm")
    return references.timm_vit(**{"num_classes": CLASSES} | options)[1]


def modules_of(model, *ours):
    """The installed library's names of q, k and v, as far as it has them."""
    names = {
        "q": ("query", "q_proj"),
        "k": ("key", "k_proj"),
        "v": ("value", "v_proj"),
    }
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for each in ours for name in names[each] if name in last]


@torch.no_grad()
def with_lora(model, **settings):
    """peft's model, with a LoRA of random values that changes the logits much."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude_vector" in name:
            parameter.mul_(1 + 0.3 * noise)
        elif "lora_" in name:
            parameter.copy_(0.2 * noise)
        elif parameter.requires_grad:
            parameter.add_(0.2 * noise)
    return tuned.eval()


def save_base(model, folder):
    """The path of the base model's file, written by its library before the model gets a LoRA."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder / "model.safetensors"
    folder.mkdir()
    save_file(model.state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors"


@torch.no_grad()
def logits_of(model, images):
    """The logits of a model of either library."""
    found = model(images)
    return getattr(found, "logits", found)


def merged_logits(weights, lora):
    """vit.py's logits after merging the LoRA, with the model's own head, and the note on it."""
    model, _ = vit.load(weights, heads=references.HEADS, head=True)
    merged, backbone = vit.load(weights, heads=references.HEADS, head=True, lora=lora)
    with torch.no_grad():
        before = model(references.images())
        after = merged(references.images())
    assert before.shape != after.shape or (before - after).abs().max() > 0.05
    return after, backbone.lora


def difference(a, b):
    assert a.shape == b.shape
    assert b.std() > 0.05
    return (a - b).abs().max().item()


def edit_config(lora, **changes):
    """Change settings in a LoRA's adapter_config.json."""
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(lora, change):
    """Replace a LoRA's tensors by what `change` makes of them."""
    path = lora / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


# ----------------------------------------------------------------------------- merging is exact

HF = {
    "classifier": {"r": 16, "lora_alpha": 32, "modules_to_save": ["classifier"]},
    "head of the weights": {"r": 4},
    "rslora": {"r": 4, "use_rslora": True},
    "patterns": {
        "r": 8,
        "rank_pattern": {r"0\.attention\.(query|attention\.query|q_proj)": 3, "k(ey|_proj)": 2},
        "alpha_pattern": {"key": 5, "attention.k_proj": 5},
    },
    "all biases": {"r": 4, "bias": "all", "modules_to_save": ["classifier"]},
    "biases, no head": {"r": 4, "bias": "all"},
    "LoRA's biases": {"r": 4, "bias": "lora_only"},
    "DoRA": {"r": 4, "use_dora": True},
    "DoRA, rslora": {"r": 4, "use_dora": True, "use_rslora": True},
    "norms": {"r": 4, "modules_to_save": ["layernorm", "layernorm_after", "classifier"]},
    "embeddings": {"r": 4, "modules_to_save": ["vit.embeddings"]},
    "patches too": {"r": 4, "target_modules": r".*(_proj|query|fc1|dense|projection)"},
    "all linear": {"r": 4, "target_modules": "all-linear"},  # the classifier too
    "Gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HF)
def test_transformers(name, tmp_path):
    """Each kind of LoRA that peft makes of a transformers ViT gives peft's logits."""
    model = hf_vit()
    weights = save_base(model, tmp_path / "base")
    targets = {"target_modules": modules_of(model, "q", "k")}
    tuned = with_lora(model, **targets | HF[name])
    tuned.save_pretrained(tmp_path / "lora")
    expected = logits_of(tuned, references.images())
    found, text = merged_logits(weights, tmp_path / "lora")
    assert difference(found, expected) < LIMIT
    assert "left out" not in text
    assert ("replace the" in text) == ("bias" in HF[name] or "modules_to_save" in HF[name])


TIMM = {
    "blocks": {"target_modules": ["qkv", "proj", "fc1"]},  # patch_embed.proj is among them
    "head": {"target_modules": "all-linear"},
    "saved": {"target_modules": ["qkv"], "modules_to_save": ["head", "norm"]},
    "DoRA": {"target_modules": ["qkv", "fc2", "patch_embed.proj"], "use_dora": True},
    "biases": {"target_modules": ["fc2", "proj"], "bias": "lora_only"},
}
VARIANTS = {
    "plain": {},
    "LayerScale, registers": {"reg_tokens": 4, "init_values": 1e-5, "no_embed_class": True},
    "mean pool": {"global_pool": "avg", "class_token": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, variant, tmp_path):
    """LoRAs of a timm ViT give peft's logits: fused qkv, a convolution, the classifier."""
    model = timm_vit(**VARIANTS[variant])
    settings = dict(TIMM[name])
    if variant == "mean pool" and "modules_to_save" in settings:
        settings["modules_to_save"] = ["head", "fc_norm"]
    weights = save_base(model, tmp_path / "base")
    tuned = with_lora(model, r=4, lora_alpha=6, **settings)
    tuned.save_pretrained(tmp_path / "lora")
    found, text = merged_logits(weights, tmp_path / "lora" / "adapter_model.safetensors")
    assert difference(found, logits_of(tuned, references.images())) < LIMIT
    assert "left out" not in text


def older_names(tensors):
    found = {}
    for name, value in tensors.items():
        for pattern, replacement in OLDER.items():
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def with_adapter_name(tensors):
    """The tensor names of a state_dict, which hold the adapter's name, in half precision."""
    found = {}
    for name, value in tensors.items():
        name = re.sub(r"(lora_[AB])\.", r"\1.default.", name)
        name = name.replace("classifier.", "classifier.modules_to_save.default.")
        found[name] = value.half()
    return found


def without_prefix(tensors):
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "limit"),
    [(older_names, LIMIT), (with_adapter_name, 0.02), (without_prefix, LIMIT)],
)
def test_other_spellings(change, limit, tmp_path):
    """Older names of transformers, names with the adapter's name, or without a prefix are read."""
    model = hf_vit()
    weights = save_base(model, tmp_path / "base")
    settings = {
        "target_modules": r".*(_proj|query|key|value|dense|fc\d)",
        "modules_to_save": ["classifier"],
    }
    tuned = with_lora(model, r=4, **settings)
    tuned.save_pretrained(tmp_path / "lora")
    names = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    edit_tensors(tmp_path / "lora", change)
    assert not names & set(load_file(tmp_path / "lora" / "adapter_model.safetensors")) - {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    found, _ = merged_logits(weights, tmp_path / "lora")
    assert difference(found, logits_of(tuned, references.images())) < limit


def test_a_dot_in_a_pattern_is_any_character(tmp_path):
    """A dot in a pattern matches any character, as in peft's regular expressions."""
    model = timm_vit()
    weights = save_base(model, tmp_path / "base")
    patterns = {"alpha_pattern": {"q.v": 40, "blocks...attn.proj": 3}}
    tuned = with_lora(model, r=4, target_modules=["qkv", "attn.proj"], **patterns)
    tuned.save_pretrained(tmp_path / "lora")
    found, _ = merged_logits(weights, tmp_path / "lora")
    assert difference(found, logits_of(tuned, references.images())) < LIMIT


def test_all_linear_with_a_pooler(tmp_path):
    """peft's "all-linear" adapts the pooler, too, which is left out: our features don't use it."""
    transformers = pytest.importorskip("transformers")
    model = references.randomise(transformers.ViTModel(transformers.ViTConfig(**SHAPE)))
    weights = save_base(model, tmp_path / "base")
    tuned = with_lora(model, r=4, target_modules="all-linear")
    tuned.save_pretrained(tmp_path / "lora")
    ours, backbone = vit.load(weights, heads=references.HEADS, lora=tmp_path / "lora")
    assert "left out: pooler.dense.weight" in backbone.lora
    assert "beside them" not in backbone.lora
    assert "(12 matrices)" in backbone.lora
    with torch.no_grad():
        expected = tuned(pixel_values=references.images()).last_hidden_state[:, 0]
        assert difference(ours(references.images()), expected) < LIMIT


def test_a_text_towers_lora(clip, tmp_path):
    """A LoRA of CLIP's text tower, or of an unknown one, isn't merged into the image tower."""
    for name, message in {
        "transformer.resblocks.1.mlp.c_fc": "nothing says whether it is of CLIP's image tower",
        "text_model.encoder.layers.1.mlp.fc1": "it is for 'text_model', not the image tower",
        "visual.transformer.resblocks.1.mlp.c_fc": "",
    }.items():
        lora = tmp_path / name
        lora.mkdir()
        tensors = {
            f"base_model.model.{name}.lora_A.weight": torch.ones(4, 64),
            f"base_model.model.{name}.lora_B.weight": torch.ones(128, 4),
        }
        save_file(tensors, lora / "adapter_model.safetensors")
        (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
        if not message:
            assert "rank 4 on c_fc" in vit.load(clip, lora=lora)[1].lora
            continue
        with pytest.raises(ValueError, match=message):
            vit.load(clip, lora=lora)


def test_a_whole_head_beside_other_layers(tmp_path):
    """A LoRA's own classifier, saved whole, replaces all layers of the weights' own: timm leaves
    out the layer before the head of its older in21k files."""
    model = timm_vit()
    weights = save_base(model, tmp_path / "base")
    tensors = load_file(weights)
    width = tensors["norm.weight"].shape[0]
    tensors["pre_logits.fc.weight"] = torch.randn(width, width)
    tensors["pre_logits.fc.bias"] = torch.randn(width)
    save_file(tensors, weights)
    tuned = with_lora(model, r=4, target_modules=["qkv"], modules_to_save=["head"])
    tuned.save_pretrained(tmp_path / "lora")
    found, text = merged_logits(weights, tmp_path / "lora")
    assert difference(found, logits_of(tuned, references.images())) < LIMIT
    assert "left out" not in text


def test_patterns_apply_as_in_peft(tmp_path):
    """The note on a LoRA states all ranks that the patterns give to its tensors."""
    model = hf_vit()
    weights = save_base(model, tmp_path / "base")
    tuned = with_lora(model, **HF["patterns"], target_modules=modules_of(model, "q", "k"))
    tuned.save_pretrained(tmp_path / "lora")
    _, text = merged_logits(weights, tmp_path / "lora")
    assert re.search(r"rank 2, 3, 8 on k\w+, q\w+ \(4 matrices\), alpha 8, merged", text)


@pytest.mark.parametrize("kind", ["CLIP", "Dinov2"])
def test_other_towers(kind, tmp_path):
    """LoRAs of CLIP's image tower, which keeps its projection, and of Dinov2 give peft's output."""
    transformers = pytest.importorskip("transformers")
    if kind == "CLIP":
        config = transformers.CLIPVisionConfig(**SHAPE, projection_dim=24)
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        config = transformers.Dinov2Config(**SHAPE | {"intermediate_size": 128})
        model = transformers.Dinov2Model(config)
    references.randomise(model)
    weights = save_base(model, tmp_path / "base")
    targets = [*modules_of(model, "q", "v"), "fc2"]
    tuned = with_lora(model, r=4, target_modules=targets)
    tuned.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        output = tuned(pixel_values=references.images())
    expected = output.image_embeds if kind == "CLIP" else output.last_hidden_state[:, 0]
    ours, _ = vit.load(weights, head=kind == "CLIP", lora=tmp_path / "lora")
    with torch.no_grad():
        assert difference(ours(references.images()), expected) < LIMIT


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("kind", ["CLIP", "Dinov2", "DINOv3"])
def test_classifiers_that_read_something_else(kind, saved, tmp_path):
    """If the classifier reads other features (transformers' CLIP and Dinov2, timm's DINOv3), the
    LoRA is merged without the heads: its own, saved whole or as factors, and the weights'."""
    transformers = pytest.importorskip("transformers")
    if kind == "DINOv3":
        pytest.importorskip("timm")
        _, model, _ = references.timm_dinov3()
        model.reset_classifier(CLASSES, "avg")
    elif kind == "CLIP":
        config = transformers.CLIPConfig(vision_config=SHAPE, num_labels=CLASSES)
        model = transformers.CLIPForImageClassification(config)
    else:
        config = transformers.Dinov2Config(**SHAPE | {"intermediate_size": 128}, num_labels=CLASSES)
        model = transformers.Dinov2ForImageClassification(config)
    references.randomise(model)
    weights = save_base(model, tmp_path / "base")
    targets = modules_of(model, "q", "v") or ["qkv"]
    head = "head" if kind == "DINOv3" else "classifier"
    settings = {"target_modules": targets, "modules_to_save": [head]}
    if not saved:
        settings = {"target_modules": [*targets, head]}
    tuned = with_lora(model, r=4, **settings)
    tuned.save_pretrained(tmp_path / "lora")
    options = {"heads": references.HEADS, "head": True}
    ours, backbone = vit.load(weights, lora=tmp_path / "lora", **options)
    assert f"left out: {head}." in backbone.lora
    assert isinstance(ours.head, torch.nn.Identity)
    assert isinstance(vit.load(weights, **options)[0].head, torch.nn.Identity)
    state = tuned.merge_and_unload().state_dict()
    pattern = r"\.1\.(.*\.)?(query|q_proj|qkv)\.weight"
    (name,) = [name for name in state if re.search(pattern, name)]
    D = references.WIDTH
    assert difference(ours.blocks[1].attn.qkv.weight[:D].detach(), state[name][:D]) < LIMIT


# -------------------------------------------------------------------------------- command lines


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """A function that runs train.py's main in an empty folder and returns the output."""
    monkeypatch.chdir(tmp_path)
    return runner(train.main, capsys)


@pytest.fixture
def exporter(capsys):
    return runner(export.main, capsys)


def make(folder, model=None, **settings):
    """A base model's file, the folder of its LoRA, and peft's model."""
    model = model or hf_vit()
    weights = save_base(model, folder / "base")
    settings = {"r": 16, "lora_alpha": 32, "modules_to_save": ["classifier"]} | settings
    settings.setdefault("target_modules", modules_of(model, "q", "k"))
    tuned = with_lora(model, **settings)
    tuned.save_pretrained(folder / "lora")
    return weights, folder / "lora", tuned


def as_it_is(weights, lora, *more):
    """Options that evaluate a LoRA without training."""
    common = ["--weights", weights, "--heads", references.HEADS, "--init-lora", lora]
    return [*common, "--epochs", 0, "--limit", 40, "--name", "a", *more]


def graph_logits(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


@torch.no_grad()
def only_q_and_v(tuned):
    """Zero the key's rows in every B of a fused qkv, as in LoRAs of q and v alone."""
    D = references.WIDTH
    for name, parameter in tuned.named_parameters():
        if "qkv.lora_B" in name:
            parameter[D : 2 * D] = 0


@pytest.mark.parametrize("kind", ["transformers", "timm", "timm, q and v"])
@pytest.mark.parametrize("method", ["head", "adaptertune"])
def test_evaluated_and_exported_as_it_is(kind, method, run, exporter, tmp_path):
    """With --epochs 0, the loaded run and the ONNX graph give peft's logits; --eval agrees."""
    if kind == "transformers":
        weights, lora, tuned = make(tmp_path)
    else:
        targets = ["qkv"] if "q and v" in kind else ["qkv", "proj", "fc1"]
        settings = {"target_modules": targets, "modules_to_save": ["head"]}
        weights, lora, tuned = make(tmp_path, timm_vit(), **settings)
    if "q and v" in kind:
        only_q_and_v(tuned)
        tuned.save_pretrained(lora)
    expected = logits_of(tuned, references.images())
    out = run(*as_it_is(weights, lora, "--method", method))
    assert re.search(r"^lora     rank 16 on \w+.*, alpha 32, merged; 2 tensors beside ", out, re.M)
    assert "it states no normalisation: the backbone's is used" in out
    assert "head     the LoRA's or its weights' own, 10 classes: row 0 is taken for '0'" in out
    assert "trained  nothing; kept are: " in out
    assert "recipe" not in out

    classifier = train.load_run("runs/a")
    with torch.no_grad():
        assert difference(classifier.network(references.images()), expected) < LIMIT
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert (result["epochs"], result["epoch"]) == (0, 0)
    assert result["val_accuracy"] is not None
    again = run("--eval", "runs/a")
    assert "lora     rank 16" in again
    assert f"its file says {result['test_accuracy']:.2f} %" in again
    assert f"test     {result['test_accuracy']:.2f} %" in again
    assert "kept" in run(*as_it_is(weights, lora, "--method", method))

    assert "lora     rank 16" in exporter("runs/a")
    (path,) = (tmp_path / "runs/a").glob("*.onnx")
    assert difference(graph_logits(path, references.images()), expected) < LIMIT


def test_accuracy_is_pefts(run, tmp_path):
    """The test accuracy of a run with --epochs 0 is that of peft's model on the same images."""
    weights, lora, tuned = make(tmp_path)
    run(*as_it_is(weights, lora, "--method", "head"))
    (options,) = train.parse(["--eval", "runs/a"])
    opened = train.open_run(options)
    hits = 0
    for images, labels in opened.batches.eval(opened.dataset.test, opened.dataset.center):
        hits += (logits_of(tuned, images).argmax(dim=-1) == labels).sum().item()
    result = train.read_result(tmp_path / "runs/a")
    assert result["test_accuracy"] == pytest.approx(100 * hits / len(opened.dataset.test))


def test_cached(run, tmp_path):
    """Cached features are those of the merged network, so the accuracy is that without --cached."""
    weights, lora, _ = make(tmp_path)
    found = []
    for more in (["--cached"], []):
        run(*as_it_is(weights, lora, "--method", "head", *more, "--name", f"n{len(more)}"))
        found.append(train.read_result(tmp_path / f"runs/n{len(more)}")["test_accuracy"])
    assert found[0] == found[1]


def test_training_starts_at_its_head_and_goes_on(run, tmp_path):
    """Training starts from the LoRA's classifier; a run of 0 epochs can be given more."""
    weights, lora, tuned = make(tmp_path)
    rates = ["--lr", 1e-12, "--head-lr", 1e-12, "--weight-decay", 0]
    out = run(*as_it_is(weights, lora, "--epochs", 1, *rates))
    assert "head     the LoRA's or its weights' own" in out
    tensors, _ = adaptertune.read("runs/a/adapters.safetensors")
    own = tuned.base_model.model.classifier.modules_to_save["default"].weight
    assert difference(tensors["head.weight"], own.detach()) < LIMIT

    command = as_it_is(weights, lora, "--name", "b")
    run(*command)
    out = run(*command, "--epochs", 2, "--lr", 5e-3, "--resume")
    assert "more     2 epochs from the weights of epoch 0" in out
    assert train.read_result(tmp_path / "runs/b")["epochs"] == 2


def test_a_head_of_other_classes(run, tmp_path):
    """A head of other classes is named and a new one trained; with --epochs 0 it is an error."""
    weights, lora, _ = make(tmp_path, hf_vit(labels=7))
    out = run(*as_it_is(weights, lora, "--epochs", 1))
    assert "head     new, since the one that came along has 7 classes, the data set 10" in out
    error = run(*as_it_is(weights, lora, "--name", "b"), status=1)
    assert "has 7 classes, the data set 10; leave out --epochs 0 to train a new head" in error
    assert not (tmp_path / "runs/b").exists()


def test_no_head(run, tmp_path):
    """If neither file has a classifier, a new head is trained; with --epochs 0 it is an error."""
    weights, lora, _ = make(tmp_path, timm_vit(num_classes=0), target_modules=["qkv"])
    error = run(*as_it_is(weights, lora), status=1)
    assert "neither the LoRA nor the weights have a classifier" in error
    assert "head     new, since neither" in run(*as_it_is(weights, lora, "--epochs", 1))


def test_a_projection_is_no_classifier():
    """CLIP's projection, which has no bias, isn't taken for a classifier."""
    projection = torch.nn.Linear(8, 5, bias=False)
    classes = [str(i) for i in range(10)]
    note = train.start_head(torch.nn.Identity(), projection, classes, epochs=1)
    assert note == "new, since neither the LoRA nor the weights have a classifier that can be used"


def test_a_changed_lora_is_noticed(run, exporter, tmp_path):
    """--eval, the same command and export.py refuse a LoRA that was changed; it may be moved."""
    weights, lora, _ = make(tmp_path)
    run(*as_it_is(weights, lora))
    moved = lora.rename(tmp_path / "moved")
    assert "no LoRA at" in run("--eval", "runs/a", status=1)
    assert "lora     rank 16" in run("--eval", "runs/a", "--init-lora", moved)
    train.load_run("runs/a", init_lora=moved)
    moved.rename(lora)
    edit_tensors(lora, lambda tensors: {name: 2 * value for name, value in tensors.items()})
    for refused in (run("--eval", "runs/a", status=1), exporter("runs/a", status=1)):
        assert "the adapters were trained on model (" in refused
    refused = run(*as_it_is(weights, lora), status=1)
    assert "runs/a/adapters.safetensors was trained on another backbone" in refused
    assert f"than {weights} with {lora} is (" in refused


def test_with_clip_methods(clip, run, tmp_path):
    """A LoRA of the image tower gives the run another fingerprint; its own head is left out."""
    model, _ = vit.load(clip, head=True)
    D = model.config.width
    generator = torch.Generator().manual_seed(0)
    prefix = "base_model.model.visual.transformer.resblocks.1.mlp.c_fc"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(4, D, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(128, 4, generator=generator),
        "base_model.model.classifier.weight": torch.zeros(CLASSES, D),
    }
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(tensors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    command = ["--weights", clip, "--method", "zero-shot", "--limit", 40]
    run(*command, "--name", "without")
    out = run(*command, "--name", "with", "--init-lora", lora)
    assert "left out: classifier.weight" in out
    prints = [train.read_result(tmp_path / "runs" / name) for name in ("with", "without")]
    assert prints[0]["fingerprint"] != prints[1]["fingerprint"]
    assert "test " in run("--eval", "runs/with")


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture
def lora(tmp_path):
    """A LoRA of TINY's qkv without peft; its backbone's file is tiny.safetensors."""
    write_tiny(tmp_path / "tiny.safetensors", seed=0)
    folder = tmp_path / "lora"
    folder.mkdir()
    prefix = "base_model.model.blocks.0.attn.qkv"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(4, 32),
        f"{prefix}.lora_B.weight": torch.randn(96, 4),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(lora):
    _, backbone = vit.load(lora.parent / "tiny.safetensors", lora=lora, head=True)
    return backbone.lora


def test_the_lora_that_the_refusals_change(lora):
    assert merge(lora).startswith("rank 4 on qkv (1 matrices), alpha 8, merged; it states no")


MERGE_THERE = "; merge it with peft's merge_and_unload\\(\\) and give the result by --weights"
SETTINGS = [
    ({"peft_type": "IA3"}, f"states the method 'IA3', not LORA{MERGE_THERE}"),
    ({"peft_type": "LOHA"}, "the method 'LOHA'"),
    ({"peft_type": None}, "the method ''"),
    ({"peft_type": ["LORA"]}, "the method \\['LORA'\\]"),
    ({"init_lora_weights": "pissa"}, f"init_lora_weights 'pissa'{MERGE_THERE}"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "'olora'"),
    ({"init_lora_weights": "loftq"}, "'loftq'"),
    ({"init_lora_weights": {}}, "init_lora_weights {}"),
    ({"lora_bias": True}, f"lora_bias True{MERGE_THERE}"),
    ({"target_parameters": ["qkv"]}, "target_parameters \\['qkv'\\]; merge"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices \\[1\\]"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"of_tomorrow": 1}, "of_tomorrow 1; merge it"),
    ({"lora_alpha": "8"}, "can't be used \\(alpha '8'\\)"),
    ({"lora_alpha": True}, "alpha True"),
    ({"lora_alpha": float("nan")}, "alpha nan"),
    ({"lora_alpha": float("inf")}, "alpha inf"),
    ({"lora_alpha": 10**400}, "alpha 1"),
    ({"use_rslora": "yes"}, "use_rslora 'yes'"),
    ({"use_dora": 1}, "use_dora 1"),
    ({"alpha_pattern": [4]}, "config.json can't be used"),
    ({"alpha_pattern": {"qkv": "4"}}, "alpha '4'"),
    ({"alpha_pattern": {"(a+)+": 4}}, "alpha_pattern '\\(a\\+\\)\\+'; merge it"),
    ({"use_dora": True}, "it has A, B for a weight of \\(96, 32\\)"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS)
def test_settings_that_are_refused(changes, message, lora):
    edit_config(lora, **changes)
    with pytest.raises(ValueError, match=message):
        merge(lora)


A = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
B = A.replace("lora_A", "lora_B")
BASE = "base_model.model."
TENSORS = [
    ({A: None}, "it has B for a weight of"),
    (
        {A: torch.zeros(4, 33)},
        r"factors of \(4, 33\) and \(96, 4\) are for no weight of \(96, 32\)",
    ),
    ({B: torch.zeros(96)}, "lora is damaged .Dimension out of range"),
    ({B: torch.full((96, 4), float("nan"))}, f"{B} has values that aren't finite"),
    ({B: torch.full((96, 4), 3e38)}, "with values that aren't finite: blocks.0.attn.qkv.weight"),
    ({B: torch.zeros(96, 4, dtype=torch.int8)}, "aren't finite numbers"),
    ({B.replace("weight", "bias"): torch.zeros(96)}, "qkv.lora_B.bias isn't a tensor of these"),
    ({f"{BASE}emb.lora_embedding_A": torch.zeros(4, 3)}, "emb.lora_embedding_A isn't a tensor"),
    ({f"{BASE}blocks.2.norm1.weight": torch.zeros(32)}, "blocks.2.norm1.weight isn't a tensor"),
    (
        {f"{BASE}norm.weight": torch.zeros(31)},
        r"of another shape: norm.weight \(31,\), not \(32,\)",
    ),
    ({f"{BASE}blocks.0.attn.qkv.weight": torch.zeros(96, 32)}, "it has A, B, whole for a weight"),
    ({A.replace(".weight", ".other.weight"): torch.zeros(4, 32)}, "it has two adapters for"),
    ({f"{BASE}blocks.0.attn.q.weight": torch.zeros(32, 32)}, "isn't a tensor of these"),
    (
        {f"{BASE}norm.lora_A.weight": torch.zeros(4), f"{BASE}norm.lora_B.weight": torch.zeros(4)},
        r"it has A, B for a weight of \(32,\)",
    ),
    (
        {f"{BASE}text_model.norm.weight": torch.zeros(32)},
        "it is for '' and 'text_model', not the image tower alone; merge",
    ),
    ({f"{BASE}student.norm.weight": torch.zeros(32)}, "it is for '' and 'student', not"),
    (
        {
            f"{BASE}layers.1.mlp.fc1.bias": torch.ones(64),
            f"{BASE}blocks.1.mlp.fc1.bias": torch.ones(64),
        },
        "fc1.bias is there twice",
    ),
    ({f"{BASE}lora_magnitude_vector": torch.ones(96)}, "lora_magnitude_vector isn't a tensor"),
    ({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(96)}, "magnitude_vector"),
    ({f"{BASE}head.norm.weight": torch.ones(32)}, "left over: .*head.norm.weight"),
]


@pytest.mark.parametrize(("changes", "message"), TENSORS)
def test_tensors_that_are_refused(changes, message, lora):
    def change(tensors):
        tensors |= changes
        for name, value in changes.items():
            if value is None:
                del tensors[name]
        return tensors

    edit_tensors(lora, change)
    with pytest.raises(ValueError, match=message):
        merge(lora)


def test_a_file_without_factors(lora):
    edit_tensors(lora, lambda tensors: {f"{BASE}norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="it holds no LoRA: no lora_A and lora_B"):
        merge(lora)


def test_missing_and_damaged_files(lora, tmp_path):
    config = lora / "adapter_config.json"
    weights = lora / "adapter_model.safetensors"
    kept = config.read_bytes()
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3"):
        config.write_bytes(content)
        with pytest.raises(ValueError, match="adapter_config.json can't be used "):
            merge(lora)
    config.unlink()
    with pytest.raises(ValueError, match="is missing, or no file; give the folder that peft's"):
        merge(lora)
    config.write_bytes(kept)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        merge(lora)
    weights.unlink()
    with pytest.raises(ValueError, match="no LoRA at .*adapter_model.safetensors"):
        merge(lora)


def test_a_lora_given_elsewhere(lora, tiny_weights, run):
    """A LoRA for --weights, --init or --eval, or of another program, is refused with advice."""
    advice = "these are LoRA adapters, not a network: give the network by --weights or --backbone"
    file = lora / "adapter_model.safetensors"
    other = lora / "other.safetensors"
    save_file(load_file(file), other)
    for path in (lora, file, other):
        assert advice in run("--weights", path, status=1)
    assert advice in run("--weights", tiny_weights, "--init", lora, status=2)
    assert advice in run("--eval", lora, status=1)
    assert advice in run("--weights", tiny_weights, "--init", other, status=1)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2)}, other)
    for_others = "else merge them with the program that made them"
    assert for_others in run("--weights", other, status=1)
    assert for_others in run("--weights", tiny_weights, "--init", other, status=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 0], "--epochs 0 trains nothing; it is for --init-lora"),
        (
            ["--scratch", "--init-lora", "x"],
            "--scratch starts from random weights; leave out --init",
        ),
        (
            ["--epochs", 0, "--init-lora", "x", "--method", "vpt"],
            "choose --method head, or adapters",
        ),
        (
            ["--epochs", 0, "--init-lora", "x", "--init", "small"],
            "choose --method head, or adapters",
        ),
        (["--epochs", 0, "--init-lora", "x", "--method", "clip-adapter"], "choose --method head"),
    ],
)
def test_wrong_usage(arguments, message, run):
    assert message in run(*arguments, status=2)


def test_without_the_option_nothing_changes(run, tiny_weights, tmp_path):
    """A run without --init-lora prints no line about a LoRA or a head."""
    out = run("--weights", tiny_weights, "--limit", 40, "--epochs", 1, "--name", "a")
    assert not re.search(r"^(lora|head) ", out, re.M)
    assert json.loads((tmp_path / "runs/a/config.json").read_text())["init_lora"] == ""
