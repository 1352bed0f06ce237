"""Fashion-MNIST (Xiao et al., 2017) from its Debian package, in TFDS."""

import gzip
import io
import pathlib
import subprocess
import tarfile

import numpy as np
import tensorflow_datasets as tfds

_PACKAGE = "dataset-fashion-mnist"
_FOLDER = "./usr/share/datasets/fashion-mnist/"


class DebianFashionMnist(tfds.core.GeneratorBasedBuilder):
    """70,000 grey images of clothes, 28 x 28, in ten classes."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"apt-get download {_PACKAGE}"

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Fashion-MNIST out of a Debian package.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(28, 28), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        (package,) = pathlib.Path(dl_manager.manual_dir).glob(f"{_PACKAGE}_*.deb")
        # The contents of a .deb as a tar archive, without installing it.
        files = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(package)],
            check=True,
            capture_output=True,
        ).stdout
        return {
            "train": self._generate_examples(files, "train"),
            "test": self._generate_examples(files, "t10k"),
        }

    def _generate_examples(self, files, prefix):
        images = _read(files, f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _read(files, f"{prefix}-labels-idx1-ubyte.gz", 8)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}


def load(data_dir: str | pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images in [0, 1] `[examples, 28, 28]`, float32, and labels, by split.

    The package is fetched from the Debian mirror and prepared on the first call.
    """
    data_dir = pathlib.Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    if not list(data_dir.glob(f"{_PACKAGE}_*.deb")):
        subprocess.run(["apt-get", "download", _PACKAGE], check=True, cwd=data_dir)
    builder = DebianFashionMnist(data_dir=data_dir / "tfds", file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=data_dir)
    )
    return {
        split: _arrays(builder.as_data_source(split)) for split in ("train", "test")
    }


def _arrays(source) -> tuple[np.ndarray, np.ndarray]:
    rows = source.__getitems__(range(len(source)))
    images = np.stack([r["image"] for r in rows]).astype(np.float32) / 255
    return images, np.asarray([r["label"] for r in rows], np.int32)


def _read(files: bytes, name: str, offset: int) -> np.ndarray:
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        packed = archive.extractfile(_FOLDER + name)
        if packed is None:
            raise FileNotFoundError(f"{name} is no file of the Debian package.")
        return np.frombuffer(gzip.decompress(packed.read()), np.uint8, offset=offset)
