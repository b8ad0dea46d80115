"""CIFAR-100 as a folder of photos by its 20 superclasses, for a sweep over ranks: 5,000 of the training images, 1,250 others to
choose by, and the whole test set. Needs Pillow.

    python tests/make_coarse.py data coarse && python train.py --dataset coarse …
"""
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402

root, out = Path(sys.argv[1]) / "cifar-100-python", Path(sys.argv[2])
names = data.unpickle(root / "meta")[b"coarse_label_names"]
train, test = data.unpickle(root / "train"), data.unpickle(root / "test")
order = data.stratified_order(torch.tensor(train[b"fine_labels"]), "coarse").tolist()
for part, batch, index in (("train", train, order[:5000]), ("val", train, order[5000:6250]), ("test", test, range(10000))):
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for i in index:
        folder = out / part / names[batch[b"coarse_labels"][i]].decode()
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(folder / f"{i:05}.png")
