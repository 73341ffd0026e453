"""The paper's own long input, on a specimen: nothing in it may upset an analysis."""

import csv
import os

import numpy as np
import pytest
import torch

from labkit.moe import ExpertAtlas, MoEReport
from labkit.testbeds import data, specimens
from labkit.testbeds.language import text_tokenizer

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif("LABKIT_DATA" not in os.environ, reason="LABKIT_DATA is not set"),
]


def paragraphs():
    """As the release reads the file: lines that are neither empty nor headings."""
    with open(data.find("look_into_moes/wikitext103_test.csv"), newline="", encoding="utf-8") as file:
        articles = [row[0] for row in csv.reader(file, delimiter="\n")]
    lines = [line.strip() for article in articles for line in article.split("\n")]
    return [line for line in lines if line and not line.startswith("=")]


def test_the_file_is_the_one_described():
    found = paragraphs()
    assert len(found) == 1841
    assert [len(line.split()) for line in found[:10]] == [117, 74, 59, 108, 128, 94, 111, 109, 13, 69]


def test_a_report_on_the_long_input():
    tokenizer = text_tokenizer()
    ids = [torch.tensor([tokenizer(line)["input_ids"]]) for line in paragraphs()[:10]]
    model = specimens.specimen("scratch")
    report = MoEReport.of(model, ids, layers=[0, 3])
    assert report.facts["tokens"] == sum(batch.shape[1] for batch in ids) > 1000
    assert not report.tables["output_similarity"].isna().any(axis=None)
    counts = report.tables["norm_score_counts"].set_index("score rank").to_numpy()
    assert (counts.sum(0) == 2 * report.facts["tokens"]).all()
    outputs = report.tables["outputs"]
    assert (outputs.top_norm_is_top_score > outputs.chance).all()
    atlas = ExpertAtlas(model)
    angular = atlas.outputs(ids, [3]).output_similarity(3)
    assert np.allclose(np.diag(angular), 1)
    assert angular.to_numpy().min() > 0.3
