"""Samples per second of this loader, webdataset and mosaicml-streaming, over the same records.

    python tests/benchmarks/bench_loader.py [--repeats 5] [--samples 1500] [--workers 2] [--window 256] [--s3]
        [--generated 25600] [--json PATH]

Two kinds of records: cached latents and embeddings of Flux at 512 x 512 (bf16; captions of 20 to 120 T5 tokens,
trimmed), and JPEG images of 512 x 512 (crops of scikit-learn's photographs). All arms shuffle within windows of the
same size, decode with the same functions and use a DataLoader with the same number of workers. The window is much
smaller than the set, as in a real run, so no arm reads the whole set before the first batch. Two things differ: the
order, and that our loader adds the padding of the texts when the batch is used. Times therefore include a copy of the
whole batch, as to a device. Arms are interleaved, and each repeat begins with empty caches (with `--s3`: a local S3
server on the same cores). The table has medians, and ratios to the faster library.

A second table is of shards as `scfm data generate` makes them, 100 small samples each, shuffled in blocks of 20,000: our loader
as it is, with all shards open before the workers start, without the recorded places of the members, and as it was: 64 open
shards, which are parsed at every opening.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from storage import S3Server

from data_tools.pack import pack
from scfm_core.data import open_shards
from scfm_core.data.corpus import Corpus
from scfm_core.data.fields import FieldKind
from scfm_core.data.image import load_picture, unit_range
from scfm_core.data.loader import batches
from scfm_core.data.members import table_of, write_members
from scfm_core.data.recipe import CacheConfig, DataConfig, SourceConfig
from scfm_core.data.schema import Batch, Manifest, Record, ShardEntry, collate
from scfm_core.data.source import PADDING
from scfm_core.data.webdataset import TarWriter

LENGTH = 256
KINDS: dict[str, FieldKind] = {"text": "tokens", "pooled": "vector"}
SHARDS = 32


def cached_fields(number: int, width: int) -> dict[str, bytes]:
    """One sample of a cache; texts have random lengths, because trimming is part of what is measured."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(20, 121, (), generator=generator)) * LENGTH // 256
    tensors = {
        "latents": torch.randn(16, width // 64, width // 64, generator=generator),
        "text": torch.randn(max(1, length), width, generator=generator),
        "pooled": torch.randn(768, generator=generator),
    }
    packed = save({name: tensor.bfloat16() for name, tensor in tensors.items()})
    return {"safetensors": packed, "txt": f"caption {number}".encode(), "json": b"{}"}


@lru_cache
def photographs() -> list[Any]:
    """scikit-learn's two photographs, 427 x 640."""
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def jpeg_fields(number: int, size: int) -> dict[str, bytes]:
    """A crop of a photograph."""
    rng = np.random.default_rng(number)
    picture = Image.fromarray(photographs()[number % 2])
    left, top = (int(rng.integers(0, max(1, edge - size // 2))) for edge in picture.size)
    buffer = io.BytesIO()
    picture.crop((left, top, left + size // 2, top + size // 2)).resize((size, size)).save(buffer, "JPEG", quality=92)
    return {"jpg": buffer.getvalue(), "txt": f"caption {number}".encode()}


def write(folder: Path, fields: Callable[[int], dict[str, bytes]], samples: int, size: int, width: int = 0) -> None:
    """Write the records as tars, and pack these into MDS."""
    entries = write_tars(folder / "tars", fields, samples, max(1, samples // SHARDS), size, width)
    corpus = Corpus(DataConfig(path=str(folder / "tars"), resolution=(size, size)))
    pack(corpus, folder / "mds", to="mds", shard_bytes=max(1 << 16, sum(entry.bytes for entry in entries) // SHARDS))


def write_tars(
    tars: Path, fields: Callable[[int], dict[str, bytes]], samples: int, per_shard: int, size: int, width: int
) -> list[ShardEntry]:
    """Write the records as tars with a manifest."""
    tars.mkdir(parents=True)
    entries = []
    for first in range(0, samples, per_shard):
        writer = TarWriter(tars / f"shard-{first // per_shard:06d}.tar")
        with writer:
            for number in range(first, min(first + per_shard, samples)):
                writer.write(f"{number:08d}", fields(number), (size, size))
        entries.append(writer.entry)
    encoder = {}
    if width:
        content = save({"text": torch.zeros(LENGTH, width, dtype=torch.bfloat16)})
        (tars / PADDING).write_bytes(content)
        encoder = {
            "encoder": "bench",
            "fields": KINDS,
            "text_length": LENGTH,
            "padding": hashlib.sha256(content).hexdigest(),
        }
    Manifest(shards=tuple(entries), **encoder).write(tars / "manifest.json")  # type: ignore[arg-type]
    return entries


def decode(fields: dict[str, bytes], key: str, size: int) -> Record:
    """Decode a sample's bytes; all arms use this."""
    if "jpg" in fields:
        return Record(key=key, caption=fields["txt"].decode(), image=load_picture(fields["jpg"], size, size).pixels)
    tensors = load(fields["safetensors"])
    text = torch.zeros(LENGTH, tensors["text"].shape[1], dtype=tensors["text"].dtype)
    text[: len(tensors["text"])] = tensors["text"]
    return Record(
        key=key,
        caption=fields["txt"].decode(),
        latents=tensors["latents"],
        fields={"text": text, "pooled": tensors["pooled"]},
        kinds=KINDS,
    )


def stack(records: Sequence[Record]) -> Any:
    """Collate records into our `Batch`."""
    return collate(list(range(len(records))), records)


def to_device(batch: Batch, paddings: Mapping[str, Sequence[Tensor | None]]) -> list[Tensor]:
    """Copy the whole batch with padded texts, as training does."""
    parts = [] if batch.latents is None else [batch.latents.clone()]
    if batch.images is not None:
        parts.append(unit_range(batch.images))
    for name, value in batch.fields.items():
        if isinstance(value, Tensor):
            parts.append(value.clone())
        else:
            whole, text = set(value.paddings or ()) == {None}, value.padded(paddings.get(name, ()))
            parts.append(text.clone() if whole else text)
    return parts


class Arms:
    """The three loaders over one set of records."""

    def __init__(
        self, base: str, scratch: Path, size: int, samples: int, batch: int, workers: int, window: int
    ) -> None:
        self.base, self.scratch, self.size = base, scratch, size
        self.samples, self.batch, self.workers = samples // batch * batch, batch, workers
        self.window = window
        self.paddings: Mapping[str, Sequence[Tensor | None]] = {}
        self.shards = max(1, -(-samples // max(1, samples // SHARDS)))

    def ours(self, form: str) -> Iterator[Any]:
        """Our loader, one epoch."""
        source = SourceConfig(name="bench", uri=f"{self.base}/{form}", format="mds" if form == "mds" else "webdataset")
        config = DataConfig(
            sources=(source,),
            resolution=(self.size, self.size),
            num_workers=self.workers,
            shuffle_block=self.window,
            cache=CacheConfig(dir=str(self.scratch / "ours")),
        )
        corpus = Corpus(config)
        self.paddings = corpus.paddings
        return batches(
            corpus,
            seed=0,
            global_batch_size=self.batch,
            micro_batch_size=self.batch,
            start=0,
            stop=self.samples,
        )

    def webdataset(self) -> Iterator[Any]:
        """webdataset: shuffled shards and a shuffle buffer of samples."""
        import webdataset

        urls = [f"{self.base}/tars/shard-{number:06d}.tar" for number in range(self.shards)]
        if self.base.startswith("s3://"):  # webdataset has no S3 client; curl on signed URLs is its fastest way
            import boto3

            client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
            places = [url.removeprefix("s3://").partition("/") for url in urls]
            urls = [
                client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
                for bucket, _, key in places
            ]
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(self.window)
        dataset = dataset.map(lambda row: decode(row, row["__key__"], self.size)).batched(
            self.batch, collation_fn=stack, partial=False
        )
        return iter(DataLoader(dataset, batch_size=None, num_workers=self.workers))

    def streaming(self) -> Iterator[Any]:
        """mosaicml-streaming: StreamingDataset with its default algorithm."""
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        size = self.size

        class Decoded(StreamingDataset):
            def __getitem__(self, index: Any) -> Record:
                row = super().__getitem__(index)
                row["txt"] = row["txt"].encode()
                return decode(row, row["__key__"], size)

        remote = f"{self.base}/mds" if self.base.startswith("s3://") else None
        local = str(self.scratch / "streaming") if remote else f"{self.base}/mds"
        dataset = Decoded(
            local=local, remote=remote, shuffle=True, shuffle_block_size=self.window, batch_size=self.batch
        )
        return iter(
            DataLoader(dataset, batch_size=self.batch, num_workers=self.workers, collate_fn=stack, drop_last=True)
        )


def time_epoch(start: Callable[[], Iterator[Batch]], arms: Arms) -> tuple[float, float]:
    """Samples per second of an epoch: from the start of the workers, and from the first batch."""
    shutil.rmtree(arms.scratch, ignore_errors=True)
    arms.scratch.mkdir()
    began = time.perf_counter()
    count, first_count, first = 0, 0, began
    for batch in start():
        count += len(batch)
        to_device(batch, arms.paddings)
        if not first_count:
            first, first_count = time.perf_counter(), count
    ended = time.perf_counter()
    return count / (ended - began), (count - first_count) / max(1e-9, ended - first)


def measure(kind: str, place: str, arms: Arms, repeats: int) -> list[dict[str, Any]]:
    """Rows with the medians of interleaved epochs."""
    starts = {
        "reference: webdataset": arms.webdataset,
        "reference: streaming": arms.streaming,
        "ours: webdataset": lambda: arms.ours("tars"),
        "ours: mds": lambda: arms.ours("mds"),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
    for _ in range(repeats):
        for name, start in starts.items():
            found[name].append(time_epoch(start, arms))
    rows = []
    for name, pairs in found.items():
        whole, steady = (statistics.median(pair[column] for pair in pairs) for column in (0, 1))
        rows.append({"records": kind, "place": place, "arm": name, "samples_per_s": whole, "steady": steady})
    best = max(row["samples_per_s"] for row in rows if row["arm"].startswith("reference"))
    for row in rows:
        row["ratio"] = row["samples_per_s"] / best
    return rows


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended: what neighbours on the machine change least."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Generated:
    """Our loader over small shards in large blocks: how often it opens them must not matter."""

    PER_SHARD, BLOCK, WIDTH = 100, 20_000, 64

    def __init__(self, folder: Path, samples: int, batch: int, workers: int) -> None:
        self.folder, self.samples, self.batch, self.workers = folder, samples // batch * batch, batch, workers
        entries = write_tars(
            folder, lambda number: cached_fields(number, self.WIDTH), samples, self.PER_SHARD, 64, self.WIDTH
        )
        write_members(folder / "manifest.json", {str(each.sha256): table_of(folder / each.name) for each in entries})

    def epoch(self, *, all_open: bool = False, parse: bool = False, most: int | None = None) -> tuple[float, float]:
        """Samples of an epoch per second, and per CPU second of all its processes, from the start of the workers.

        Args:
            all_open: open all shards before.
            parse: as if the places of the members were not recorded, as in tars of other tools.
            most: open shards of a process; then their tables are not kept.
        """
        kept = open_shards.most_open, open_shards._TABLE_BYTES
        if most is not None:
            open_shards.most_open, open_shards._TABLE_BYTES = lambda: most, 0
        try:
            config = DataConfig(
                path=str(self.folder),
                resolution=(64, 64),
                num_workers=self.workers,
                shuffle_block=self.BLOCK,
                verify=False,  # hashing takes the same time in all arms
            )
            corpus = Corpus(config)
            if parse:
                corpus.sources[0].members = None  # type: ignore[union-attr]
            for item in range(0, len(corpus), self.PER_SHARD) if all_open else ():
                corpus.record(item)
            began, cpu, count = time.perf_counter(), cpu_seconds(), 0
            options = {
                "global_batch_size": self.batch,
                "micro_batch_size": self.batch,
                "start": 0,
                "stop": self.samples,
            }
            for batch in batches(corpus, seed=0, **options):
                count += len(batch)
            return count / (time.perf_counter() - began), count / (cpu_seconds() - cpu)
        finally:
            open_shards.most_open, open_shards._TABLE_BYTES = kept

    def measure(self, repeats: int) -> list[dict[str, Any]]:
        """Rows with the medians of interleaved epochs."""
        arms: dict[str, dict[str, Any]] = {
            "reference: all open": {"all_open": True},
            "ours": {},
            "ours: tars of others": {"parse": True},
            "64 open, always parsed": {"parse": True, "most": 64},
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(repeats):
            for name, options in arms.items():
                rates[name].append(self.epoch(**options))
        rows: list[dict[str, Any]] = []
        for name, found in rates.items():
            real, cpu = (statistics.median(pair[column] for pair in found) for column in (0, 1))
            rows.append({"arm": name, "samples_per_s": real, "samples_per_cpu_s": cpu})
        for row in rows:
            row["ratio"] = row["samples_per_s"] / rows[0]["samples_per_s"]
            row["cpu_ratio"] = row["samples_per_cpu_s"] / rows[0]["samples_per_cpu_s"]
        return rows


def trimmed(folder: Path) -> dict[str, float]:
    """Bytes per sample of the cached records, trimmed and with the text's padding."""
    manifest = Manifest.parse((folder / "tars" / "manifest.json").read_text(), "bench")
    bytes_a_sample = sum(shard.bytes for shard in manifest.shards) / manifest.samples
    shards = [Corpus(DataConfig(path=str(folder / "tars"), resolution=manifest.sizes.pop())).raw(0)[0]]
    stored = [load(shard.read(i, "safetensors") or b"")["text"] for shard in shards if shard for i in range(len(shard))]
    missing = statistics.mean(2 * text.shape[1] * (LENGTH - len(text)) for text in stored)
    return {"trimmed": bytes_a_sample, "padded": bytes_a_sample + missing}


def main(argv: list[str] | None = None) -> None:
    """Run all arms, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096, help="of the text embeddings; smaller for a quick test")
    parser.add_argument("--window", type=int, default=256, help="size of the shuffle window, in samples")
    parser.add_argument("--generated", type=int, default=25_600, help="samples of the second table; 0: none")
    parser.add_argument("--s3", action="store_true", help="also from a local S3 server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, sizes, generated = [], {}, []
    with ExitStack() as stack_:
        root = Path(stack_.enter_context(tempfile.TemporaryDirectory()))
        side = max(16, options.width // 8)
        write(
            root / "cached", lambda number: cached_fields(number, options.width), options.samples, side, options.width
        )
        write(root / "jpeg", lambda number: jpeg_fields(number, side), options.samples, side)
        sizes = trimmed(root / "cached")
        places = {"local": str(root)}
        if options.s3:
            server = stack_.enter_context(S3Server())
            os.environ.update(server.environment | {"S3_ENDPOINT_URL": server.endpoint})
            server.upload(root / "cached", "records", "cached")
            server.upload(root / "jpeg", "records", "jpeg")
            places["s3"] = "s3://records"
        for place, base in places.items():
            for kind in ("cached", "jpeg"):
                arms = Arms(
                    f"{base}/{kind}",
                    root / "scratch",
                    side,
                    options.samples,
                    options.batch,
                    options.workers,
                    options.window,
                )
                rows += measure(kind, place, arms, options.repeats)
        if options.generated:
            arms_of_small = Generated(root / "generated", options.generated, options.batch, options.workers)
            generated = arms_of_small.measure(options.repeats)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; ", end="")
    print(f"{options.samples} samples, batch {options.batch}, {options.workers} workers, {options.repeats} repeats")
    print(
        f"cached records: {sizes['trimmed'] / 1e3:,.0f} kB a sample, {sizes['padded'] / 1e3:,.0f} kB with the padding"
    )
    print(f"{'records':<9}{'from':<7}{'arm':<24}{'samples/s':>10}{'steady':>9}   x reference (the faster one)")
    for row in rows:
        print(
            f"{row['records']:<9}{row['place']:<7}{row['arm']:<24}{row['samples_per_s']:>10.0f}{row['steady']:>9.0f}"
            f"   {row['ratio']:.2f} x reference"
        )
    for row in generated:
        print(
            f"generated: {row['arm']:<24}{row['samples_per_s']:>10.0f} samples/s, {row['samples_per_cpu_s']:>6.0f} a CPU second"
            f"   {row['ratio']:.2f} x, {row['cpu_ratio']:.2f} x all open"
        )
    if options.json:
        content = {"rows": rows, "bytes_a_sample": sizes, "generated": generated}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
