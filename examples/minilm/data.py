"""The VADER movie snippets (Hutto and Gilbert, ICWSM 2014) in TFDS and grain."""

import io
import pathlib
import tarfile
import zlib

import grain
import numpy as np
import tensorflow_datasets as tfds
import tokenizers

from minilm import model

SDIST = "vaderSentiment-3.3.2.tar.gz"

_DOWNLOAD = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {}"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_TEST_ONE_IN = 5


class VaderMovie(tfds.core.GeneratorBasedBuilder):
    """Sentences from movie reviews, each rated by twenty people from -4 to 4.

    The label is the sign of the mean rating; the few snippets rated 0 are dropped.
    A snippet goes to the test split by a checksum of its text, so that the split is
    the same everywhere and no text stands on both sides.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = _DOWNLOAD.format("FOLDER")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Movie review snippets out of the vaderSentiment package.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        rows = _rows(pathlib.Path(dl_manager.manual_dir) / SDIST)
        return {
            "train": self._generate_examples(rows, test=False),
            "test": self._generate_examples(rows, test=True),
        }

    def _generate_examples(self, rows, *, test):
        for key, rating, text in rows:
            held_out = zlib.crc32(text.encode()) % _TEST_ONE_IN == 0
            if rating != 0 and held_out == test:
                yield key, {"text": text, "label": int(rating > 0)}


def prepare(data_dir: str | pathlib.Path) -> tfds.core.DatasetBuilder:
    """The data set, written under `data_dir` as ArrayRecord files on the first call.

    Args:
        data_dir: The folder that holds the source archive of vaderSentiment.

    Raises:
        FileNotFoundError: If the archive is not there.
    """
    data_dir = pathlib.Path(data_dir)
    if not (data_dir / SDIST).exists():
        raise FileNotFoundError(
            f"{data_dir / SDIST} is missing. Run: {_DOWNLOAD.format(data_dir)}"
        )
    builder = VaderMovie(data_dir=data_dir / "tfds", file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=data_dir)
    builder.download_and_prepare(download_config=config)
    return builder


def batches(
    builder: tfds.core.DatasetBuilder,
    *,
    batch: int,
    length: int,
    seed: int,
    split: str = "train",
) -> grain.DatasetIterator:
    """Endless training batches, shuffled anew each epoch.

    The place in the stream is `get_state()`, and `set_state` goes back to it: the
    order is a function of the seed and the place alone.

    Returns:
        An iterator over `{"ids": [batch, length], "mask": [batch, length],
        "label": [batch]}`.
    """
    source = grain.MapDataset.source(builder.as_data_source(split))
    stream = (
        source.shuffle(seed=seed)
        .batch(batch, drop_remainder=True, batch_fn=_Encode(length))
        .repeat()
        .to_iter_dataset()
    )
    return iter(stream)


def test_set(
    builder: tfds.core.DatasetBuilder, *, length: int, split: str = "test"
) -> dict[str, np.ndarray]:
    """All held-out snippets as one batch."""
    return _Encode(length)(list(builder.as_data_source(split)))


def truncated(builder: tfds.core.DatasetBuilder, *, length: int) -> float:
    """The share of the training snippets that are longer than `length` tokens."""
    examples = list(builder.as_data_source("train"))
    # One token more than the limit tells whether anything was cut off.
    return float(_Encode(length + 1)(examples)["mask"][:, -1].mean())


class _Encode:
    """Examples to a batch of token ids, cut and padded to one length."""

    def __init__(self, length: int):
        file = model.files() / "tokenizer.json"
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length)

    def __call__(self, examples) -> dict[str, np.ndarray]:
        texts = [example["text"].decode() for example in examples]
        encoded = self._tokenizer.encode_batch(texts)
        return {
            "ids": np.array([e.ids for e in encoded], np.int32),
            "mask": np.array([e.attention_mask for e in encoded], bool),
            "label": np.array([example["label"] for example in examples], np.int32),
        }


def _rows(sdist: pathlib.Path) -> list[tuple[str, float, str]]:
    """Every snippet as (id, mean rating, text)."""
    with tarfile.open(sdist) as outer:
        inner = io.BytesIO(outer.extractfile(_INNER).read())
    with tarfile.open(fileobj=inner) as archive:
        lines = archive.extractfile(_SNIPPETS).read().decode("utf-8").splitlines()
    fields = (line.split("\t", 2) for line in lines)
    return [(key, float(rating), text.strip()) for key, rating, text in fields]
