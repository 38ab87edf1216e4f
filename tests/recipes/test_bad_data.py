"""Mistakes in data recipes and in `scfm data` commands: exit code 2, one message, no traceback, no secrets."""

import io
import json
import os
import tarfile

import pytest
import yaml

from recipes.cli import main
from scfm_core.data.schema import Manifest
from scfm_core.train.parse import to_plain

SECRET = "canary-6f1d2c"


@pytest.fixture
def recipe(make_config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_plain(make_config())))
    return path


def with_sources(recipe, *sources, **changes):
    """The command for the recipe with these sources in place of its path."""
    tree = yaml.safe_load(recipe.read_text())
    tree["data"] |= {"path": None, "sources": list(sources)} | changes
    recipe.write_text(yaml.safe_dump(tree))
    return ["train", str(recipe)]


def cache(tiny, **changes):
    return {"name": "digits", "uri": str(tiny / "cache")} | changes


def pipe(recipe, tiny, tmp_path):
    return with_sources(
        recipe, cache(tiny, uri=f"pipe:touch {tmp_path / 'run_me'}")
    ), "commands and chained addresses are not supported"


def command_in_a_path(recipe, tiny, tmp_path):
    return [
        "train",
        str(recipe),
        f"data.path=$(touch {tmp_path / 'run_me'})",
    ], "commands and chained addresses are not supported"


def unknown_scheme(recipe, tiny, tmp_path):
    return with_sources(
        recipe, cache(tiny, uri="ftp://host/x.tar")
    ), "scheme 'ftp' is unknown; give a path, or an address of s3, https"


def password(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny, uri=f"https://me:{SECRET}@host/x.tar"))
    return words, "Put credentials into the environment"


def signature(recipe, tiny, tmp_path):
    return with_sources(recipe, cache(tiny, uri=f"https://host/x.tar?X-Amz-Signature={SECRET}")), "has a query"


def path_and_sources(recipe, tiny, tmp_path):
    return with_sources(
        recipe, cache(tiny), path="x"
    ), "data needs either data.path or data.sources, not both: set data.path=none"


def neither_path_nor_sources(recipe, tiny, tmp_path):
    return with_sources(recipe), "data needs either data.path or data.sources"


def unknown_key_of_a_source(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny), cache(tiny, name="b", wieght=1))
    return words, "unknown key data.sources.1.wieght; did you mean data.sources.1.weight?"


def missing_list_member(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny))
    return [*words, "data.sources.1.weight=2"], "a list of 1 has no member '1'; the first is 0"


def duplicate_name(recipe, tiny, tmp_path):
    return with_sources(recipe, cache(tiny), cache(tiny)), "data.sources has two sources of one name"


def weight_of_only_one_source(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny, weight=1.0), cache(tiny, name="b"))
    return words, "give every source a weight, or none of them"


def negative_weight(recipe, tiny, tmp_path):
    return with_sources(
        recipe, cache(tiny, weight=-1.0)
    ), "weight must be positive, got -1.0; to exclude a source, delete it"


def weight_of_less_than_one_sample(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny, weight=1.0), cache(tiny, name="b", weight=1e-9))
    return words, "data.sources (b): its weight gives it less than one of the 96 samples of an epoch"


def images_beside_a_cache(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny), cache(tiny, name="b", uri=str(tiny / "digits"), format="folder"))
    return words, "all must be images, or cached by one model at one text length"


def unclosed_braces(recipe, tiny, tmp_path):
    return with_sources(recipe, cache(tiny, uri=f"{tiny}/cache/shard-{{0..3.tar")), "do not close"


def shard_missing_in_manifest(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny, uri=f"{tiny}/cache/shard-{{000000..000005}}.tar"))
    return words, "names 3 shards that the manifest does not list, the first is 'shard-000003.tar'"


def split_of_named_shards(recipe, tiny, tmp_path):
    words = with_sources(recipe, cache(tiny, uri=f"{tiny}/cache/shard-{{000000..000002}}.tar", split="train"))
    return words, "split is a subfolder of uri"


def tars_without_a_manifest(recipe, tiny, tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"")
    return ["train", str(recipe), f"data.path={tmp_path / 'tars'}"], "run `scfm data index"


def missing_mds_index(recipe, tiny, tmp_path):
    return with_sources(recipe, cache(tiny, format="mds")), "there is no index.json in"


def invalid_mds_index(recipe, tiny, tmp_path):
    (tmp_path / "index.json").write_text('{"shards": 3}')
    return with_sources(recipe, cache(tiny, uri=str(tmp_path), format="mds")), "index.json is damaged"


def remote_folder(recipe, tiny, tmp_path):
    return with_sources(
        recipe, cache(tiny, uri="s3://bucket/x", format="folder")
    ), "format folder is for this machine's files"


def missing_caption_field(recipe, tiny, tmp_path):
    """The shard's captions are in a field with another name."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in (("0.png", (tiny / "digits" / "0000.png").read_bytes()), ("0.caption", b"text")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(content.getvalue())
    assert main(["data", "index", str(tmp_path / "tars")]) == 0
    words = with_sources(recipe, cache(tiny, uri=str(tmp_path / "tars")))
    return words, "has no caption in txt, but the fields png, caption. Name the right one with `captions:`"


def partitions_that_do_not_divide(recipe, tiny, tmp_path):
    words = ["train", str(recipe), "data.partitions=3"]
    return words, "data.partitions 3 does not divide train.global_batch_size 8"


def bucket_that_cannot_be_packed(recipe, tiny, tmp_path):
    return ["train", str(recipe), "data.buckets=[[16,16],[18,16]]"], "multiples of 4; the nearest is 16 x 16"


def bucket_of_one_number(recipe, tiny, tmp_path):
    return ["train", str(recipe), "data.buckets=[[16]]"], "data.buckets"


def bad_fraction_of_one(recipe, tiny, tmp_path):
    return ["train", str(recipe), "data.max_bad_fraction=1"], "data.max_bad_fraction must be in [0, 1), got 1"


def zero_shuffle_block(recipe, tiny, tmp_path):
    return ["train", str(recipe), "data.shuffle_block=0"], "data.shuffle_block must be at least 1, got 0"


def zero_cache_limit(recipe, tiny, tmp_path):
    return ["train", str(recipe), "data.cache.limit_gb=0"], "data.cache.limit_gb must be positive or none, got 0"


def unknown_data_recipe(recipe, tiny, tmp_path):
    return [
        "train",
        str(recipe),
        "data=digit.yaml",
    ], "there is no file 'digit.yaml'. Shipped data recipes: cc12m_mds.yaml, digits"


def manifest_of_a_later_version(recipe, tiny, tmp_path):
    text = (tiny / "cache" / "manifest.json").read_text()
    tree = json.loads(text) | {"version": 99}
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    words = with_sources(recipe, cache(tiny, manifest=str(tmp_path / "manifest.json")))
    return words, "has another format or version than this release reads"


def manifest_with_path_outside(recipe, tiny, tmp_path):
    manifest = Manifest.parse((tiny / "cache" / "manifest.json").read_text(), "test")
    (tmp_path / "manifest.json").write_text(manifest.dumps().replace("shard-000000.tar", "../shard-000000.tar"))
    words = with_sources(recipe, cache(tiny, manifest=str(tmp_path / "manifest.json")))
    return words, "names a shard outside its folder: '../shard-000000.tar'"


def encode_a_cache(recipe, tiny, tmp_path):
    words = ["data", "encode", str(tiny / "cache"), "-o", str(tmp_path / "out"), "--model", str(tiny / "flux")]
    return words, "the source is a cache already; only images can be encoded"


def encode_over_a_cache(recipe, tiny, tmp_path):
    words = ["data", "encode", str(tiny / "digits"), "-o", str(tiny / "cache"), "--model", str(tiny / "flux")]
    return [
        *words,
        "--resolution",
        "16",
        "16",
    ], "text_length: 8 before, 256 now\nStart with the same arguments, choose another folder"


def override_without_data_prefix(recipe, tiny, tmp_path):
    words = ["data", "inspect", str(tiny / "cache"), "resolution=[8,8]"]
    return words, "override 'resolution=[8,8]' is not of the form data.key=value"


def generate_without_prompts(recipe, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n")
    words = [
        "data",
        "generate",
        str(tmp_path / "prompts.txt"),
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(tiny / "flux"),
    ]
    return words, "has no prompt; put one on each line"


def generate_with_invalid_shift(recipe, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n")
    words = [
        "data",
        "generate",
        str(tmp_path / "prompts.txt"),
        "-o",
        str(tmp_path / "out"),
        "--model",
        str(tiny / "flux"),
    ]
    return [*words, "--shift", "three"], "--shift must be a number or dynamic, got 'three'"


def pack_into_existing_folder(recipe, tiny, tmp_path):
    return ["data", "pack", str(tiny / "cache"), "-o", str(tiny / "digits"), "--to", "mds"], "digits"


def index_a_mixture(recipe, tiny, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"sources": [cache(tiny), cache(tiny, name="b")]}))
    return ["data", "index", str(path)], "has several sources; index each source separately"


CASES = [
    pipe, command_in_a_path, unknown_scheme, password, signature, path_and_sources, neither_path_nor_sources, unknown_key_of_a_source,
    missing_list_member, duplicate_name, weight_of_only_one_source, negative_weight, weight_of_less_than_one_sample,
    images_beside_a_cache, unclosed_braces, shard_missing_in_manifest, split_of_named_shards,
    tars_without_a_manifest, missing_mds_index, invalid_mds_index, remote_folder, missing_caption_field,
    partitions_that_do_not_divide, bucket_that_cannot_be_packed, bucket_of_one_number, bad_fraction_of_one, zero_shuffle_block, zero_cache_limit,
    unknown_data_recipe, manifest_of_a_later_version, manifest_with_path_outside, encode_a_cache, encode_over_a_cache,
    override_without_data_prefix, generate_without_prompts, generate_with_invalid_shift, pack_into_existing_folder,
    index_a_mixture,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_data(case, recipe, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, message = case(recipe, tiny, tmp_path)
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    error = captured.err[captured.err.index("scfm: error: ") :]
    assert message in error
    assert "Traceback" not in captured.err
    assert SECRET not in captured.err + captured.out
    assert not (tmp_path / "run_me").exists()
    with capsys.disabled():
        if os.environ.get("SCFM_SHOW_MESSAGES"):
            print(f"\n{case.__name__}: {' '.join(error.split())}")
