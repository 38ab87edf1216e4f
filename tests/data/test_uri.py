"""Addresses: only allowed ones pass, and no message repeats a secret in an address."""

import multiprocessing
import os
import resource
import traceback
from pathlib import Path
from typing import Any

import pytest

from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.uri import SCHEMES, expand, is_remote, join, parent, refuse_uri
from scfm_core.errors import UserError
from scfm_core.train.parse import parse_config

SECRET = "hush-4711"

GOOD = [
    "digits",
    "/data/digits",
    "~/data/digits",
    "data/{00000..00127}.tar",
    "C:colon/and (brackets) & more",
    "s3://bucket",
    "s3://bucket/prefix/{00000..00127}.tar",
    "https://host.example:8443/data",
    "http://127.0.0.1:80/data",
    "gs://bucket/prefix",
    "az://container/prefix",
    "abfs://container/prefix",
]
COMMANDS = [
    "pipe:cat /etc/passwd",
    "pipe:curl https://host/x.tar",
    "pipe://x",
    "$(touch x)",
    "s3://bucket/$(touch x)/x.tar",
    "s3://bucket/`touch x`.tar",
    "data\ntouch x",
    "data\0.tar",
]
UNSUPPORTED_SCHEMES = [
    "ftp://host/x",
    "ssh://host/x",
    "hdfs://host/x",
    "hf://datasets/x",
    "memory://x",
    "github://org:repo@main/x",
    "data://text/plain,x",
    "S3://bucket/x",
    "simplecache::s3://bucket/x",
    "zip://x::s3://bucket/x",
    "{s3,pipe}://bucket/x",
    " s3://bucket/x",
]
SECRETS = [
    f"https://user:{SECRET}@host/x",
    f"https://{SECRET}@host/x",
    f"s3://KEY:{SECRET}@bucket/x",
    f"s3://KEY:{SECRET}@bucket",
    f"s3://KEY:{SECRET}@bucket/{{0..3}}.tar",
    f"https://host/x?X-Amz-Signature={SECRET}",
    f"https://host/x.tar?{SECRET}",
    f"https://host?{SECRET}",
    f"https://host/{{a?{SECRET},b}}.tar",
    f"https://host/x#{SECRET}",
    f"https://user:{SECRET}@[host/x",
    pytest.param(
        f"file://user:{SECRET}@host/x",
    ),
    pytest.param(
        f"https://user:{SECRET}@ex℀mple/x",
    ),
    pytest.param(
        f"user:{SECRET}@host://x",
    ),
    pytest.param(
        f"https:/user:{SECRET}@host/x",
    ),
]


@pytest.mark.parametrize("uri", GOOD)
def test_allowed(uri: str) -> None:
    refuse_uri(uri, "here")
    assert is_remote(uri) == uri.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


@pytest.mark.parametrize("uri", COMMANDS)
def test_commands(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^here: commands and chained addresses are not supported"):
        refuse_uri(uri, "here")


@pytest.mark.parametrize("uri", UNSUPPORTED_SCHEMES)
def test_other_schemes(uri: str) -> None:
    with pytest.raises(
        ValueError, match=r"^here: ((scheme .*|the text before ://) is unknown|commands .* are not supported)"
    ):
        refuse_uri(uri, "here")


def test_file_addresses() -> None:
    with pytest.raises(ValueError, match=r"^here: write only the path, without file://"):
        refuse_uri("file:///data/x", "here")


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "https:///x"])
def test_an_address_without_a_host(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^here: .* names no (bucket|host)"):
        refuse_uri(uri, "here")


def test_addresses_of_azure() -> None:
    refuse_uri("abfs://container@account.dfs.core.windows.net/prefix", "here")


@pytest.mark.parametrize("uri", ["s3://bucket/x::file:///etc/passwd", "https://host/x::github://org:repo@main/x"])
def test_chains_of_fsspec(uri: str) -> None:
    with pytest.raises(ValueError, match="here"):
        refuse_uri(uri, "here")


@pytest.mark.parametrize("uri", SECRETS)
class TestSecrets:
    def test_are_refused_and_not_repeated(self, uri: str) -> None:
        with pytest.raises(ValueError) as refused:
            refuse_uri(uri, "here")
        assert SECRET not in "".join(traceback.format_exception(refused.value))

    def test_in_a_source(self, uri: str) -> None:
        for fields in ({"uri": uri}, {"uri": "digits", "manifest": uri}):
            with pytest.raises(ValueError) as refused:
                SourceConfig(name="web", **fields)
            assert SECRET not in str(refused.value)

    def test_in_data_path(self, uri: str) -> None:
        with pytest.raises(ValueError) as refused:
            DataConfig(path=uri)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("uri", ["https://user:x@host/x", "https://host/x?y"])
def test_the_message_says_where_to_put_a_secret(uri: str) -> None:
    with pytest.raises(ValueError, match=r"stored in every checkpoint.*credentials.* the environment"):
        refuse_uri(uri, "here")


def data_sections(uri: str) -> list[dict[str, Any]]:
    return [
        {"path": uri},
        {"sources": [{"name": "web", "uri": uri}]},
        {"sources": [{"name": "web", "uri": "digits", "manifest": uri}]},
        {"sources": [{"name": "good", "uri": "digits"}, {"name": "web", "uri": uri, "format": "mds"}]},
    ]


@pytest.mark.parametrize("form", range(4))
class TestThroughARecipe:
    @pytest.mark.parametrize("uri", ["pipe:touch x", "s3://bucket/$(touch x)", "ftp://host/x", "file:///x", "s3:///x"])
    def test_the_message_names_the_key(self, tree: dict[str, Any], uri: str, form: int) -> None:
        tree["data"] = {"resolution": [16, 16], **data_sections(uri)[form]}
        where = "data.path" if form == 0 else r"data.sources \(web\): (uri|manifest)"
        with pytest.raises(UserError, match=f"^in recipe.yaml: {where}: "):
            parse_config(tree, source="recipe.yaml")

    @pytest.mark.parametrize("uri", [f"https://user:{SECRET}@host/x", f"https://host/x?sig={SECRET}"])
    def test_no_secret_in_the_message(self, tree: dict[str, Any], uri: str, form: int) -> None:
        tree["data"] = {"resolution": [16, 16], **data_sections(uri)[form]}
        with pytest.raises(UserError, match="every checkpoint") as refused:
            parse_config(tree, source="recipe.yaml")
        assert SECRET not in str(refused.value)

    @pytest.mark.parametrize("uri", ["digits", "s3://bucket/prefix", "https://host/x"])
    def test_valid_addresses_pass(self, tree: dict[str, Any], uri: str, form: int) -> None:
        tree["data"] = {"resolution": [16, 16], **data_sections(uri)[form]}
        assert uri in {tree["data"].get("path")} | {
            value
            for source in parse_config(tree, source="recipe.yaml").data.sources
            for value in vars(source).values()
            if isinstance(value, str)
        }


def test_no_secret_in_the_traceback(tree: dict[str, Any]) -> None:
    tree["data"] = {"resolution": [16, 16], "path": f"https://user:{SECRET}@host/x"}
    with pytest.raises(UserError, match="every checkpoint") as refused:
        parse_config(tree, source="recipe.yaml")
    assert SECRET not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "sources",
    [
        f"https://user:{SECRET}@host/x",
        [f"https://user:{SECRET}@host/x"],
        {"name": "web", "uri": f"https://user:{SECRET}@host/x"},
    ],
    ids=["text", "list", "mapping"],
)
def test_an_address_under_a_wrong_key_is_not_repeated(tree: dict[str, Any], sources: Any) -> None:
    tree["data"] = {"resolution": [16, 16], "sources": sources}
    with pytest.raises(UserError) as refused:
        parse_config(tree, source="recipe.yaml")
    assert SECRET not in str(refused.value)


REFUSED = 7


def expand_in_a_gigabyte(uri: str) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    try:
        expand(uri, "here")
    except UserError:
        os._exit(REFUSED)
    finally:
        os._exit(1)


class TestExpand:
    @pytest.mark.parametrize(
        ("uri", "names"),
        [
            ("s3://bucket/x.tar", ["s3://bucket/x.tar"]),
            ("s3://bucket/{008..011}.tar", [f"s3://bucket/{number:03d}.tar" for number in range(8, 12)]),
            ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
            ("{b,a}.tar", ["b.tar", "a.tar"]),
            ("a/{{1,2},x}.tar", ["a/1.tar", "a/2.tar", "a/x.tar"]),
        ],
    )
    def test_braces_are_expanded_in_order(self, uri: str, names: list[str]) -> None:
        assert expand(uri, "here") == names

    @pytest.mark.parametrize("uri", ["{0..3.tar", "0..3}.tar", "{a,{b,c}.tar"])
    def test_unclosed_braces(self, uri: str) -> None:
        with pytest.raises(UserError, match=r"^here: the braces of '.*' do not close"):
            expand(uri, "here")

    @pytest.mark.parametrize("uri", ["{a,a}.tar", "{0..3}{,}.tar", "{0..2}/{x,y,x}.tar"])
    def test_a_shard_named_twice(self, uri: str) -> None:
        with pytest.raises(UserError, match=r"^here: '.*' names a shard twice"):
            expand(uri, "here")

    @pytest.mark.parametrize("uri", ["{0..1000000}.tar", "{0..1999}/{0..1999}.tar"])
    def test_millions(self, uri: str) -> None:
        with pytest.raises(UserError, match=r"^here: .* names? more than 1000000 shards"):
            expand(uri, "here")

    def test_a_million_is_allowed(self) -> None:
        assert len(expand("{000000..999999}.tar", "here")) == 1_000_000

    @pytest.mark.processes
    def test_billions_cost_no_memory(self) -> None:
        """In a process that may use only one more gigabyte."""
        process = multiprocessing.get_context("fork").Process(
            target=expand_in_a_gigabyte, args=("{0..99999999999}.tar",)
        )
        process.start()
        process.join(30)
        process.kill()
        assert process.exitcode == REFUSED

    def test_nested_braces(self) -> None:
        with pytest.raises(UserError, match=r"^here"):
            expand("{a," * 2000 + "}" * 2000, "here")


@pytest.mark.parametrize("base", ["s3://bucket/prefix", "/data", "https://host"])
def test_parent_undoes_join(base: str) -> None:
    assert join(base, "x.tar") == join(f"{base}/", "x.tar") == f"{base}/x.tar"
    assert parent(join(base, "x.tar")) == base
    assert parent(join(base, "sub/x.tar")) == f"{base}/sub"


def test_parent_of_a_name_without_folder() -> None:
    assert parent("x.tar") == "."
    assert parent("/x.tar") == "/"
