"""A prompt, a list of prompts, or a file of prompts."""

import json

import pytest

from scfm_core.errors import UserError
from scfm_core.train.config import SampleConfig
from scfm_core.train.prompts import read_prompts, validation_prompts


@pytest.mark.parametrize(
    "prompt", ["a red fox", "fox", "fox, 4.5 m long, in St. John's/Newfoundland", "a cat. " * 200, "猫と犬"]
)
def test_a_string_that_is_no_path_is_a_prompt(prompt):
    assert read_prompts(prompt, "--prompts") == [prompt.strip()]
    assert validation_prompts(SampleConfig(prompts=prompt)) == [prompt.strip()]


@pytest.mark.parametrize("name", ["prompts.txt", "my prompts.txt", "prompts", "a.b"])
def test_an_existing_file_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("a cat\n\n a dog \n")
    assert read_prompts(name, "sample.prompts") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "name", ["prompts.txt", "my prompts.txt", "data/prompts", "./x", "~/x", "captions.json", "p.text"]
)
def test_a_missing_file_is_no_prompt(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"sample\.prompts: the prompt file .* cannot be read .*one prompt on each line"
    ):
        read_prompts(name, "sample.prompts")


def test_captions_in_the_format_of_coco(tmp_path):
    rows = [{"image_id": 2, "id": 9, "caption": "b2"}, {"image_id": 2, "id": 3, "caption": "b1"}]
    rows.append({"image_id": 1, "id": 5, "caption": "a"})
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    assert read_prompts(str(tmp_path / "captions.json"), "evaluate.prompts") == ["a", "b1"]
