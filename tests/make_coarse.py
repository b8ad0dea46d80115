"""Write CIFAR-100 as folders of photos, one per superclass, for a sweep over ranks.

It writes 5,000 training images, 1,250 others for validation, and the whole test set. Needs Pillow.

    python tests/make_coarse.py data coarse && python train.py --dataset coarse …
"""

import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


def write(folder, batch, index, names):
    """Write the images `index` of a batch as PNG files, in one folder for each superclass."""
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [n, H, W, 3]
    for i in index:
        superclass = names[batch[b"coarse_labels"][i]].decode()
        path = folder / superclass / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)


def main(data_dir, out):
    root = Path(data_dir) / "cifar-100-python"
    names = data.unpickle(root / "meta")[b"coarse_label_names"]
    train = data.unpickle(root / "train")
    test = data.unpickle(root / "test")
    labels = torch.tensor(train[b"fine_labels"])
    order = data.stratified_order(labels, "coarse").tolist()
    write(Path(out) / "train", train, order[:5000], names)
    write(Path(out) / "val", train, order[5000:6250], names)
    write(Path(out) / "test", test, range(10000), names)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
