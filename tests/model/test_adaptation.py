"""A new site: local subjects are never tested on, and what they change is told there and elsewhere."""

import pandas as pd
import pytest
import yaml

from imaging.config import read_params
from imaging.recipe import SplitSection
from imaging.vocabulary import Kind
from tests.tiny import write_cohort, write_root
from training.adaptation import plan_adaptation
from training.splitting import choose_local, split_table
from training.study import run_claim


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapt")
    places = write_root(root, nodes=Kind.CLASSIFICATION)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["tasks"]["nodes"]["fit"]["epochs"] = 2
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    write_cohort(places, "nodes", Kind.CLASSIFICATION)
    study = plan_adaptation(places, "nodes", (8, 16), (1,))
    run_claim(places, study, "new-site", root / "told")
    return pd.read_parquet(root / "told" / "answers.parquet"), read_params(places).task("nodes")


def test_every_way_answers_the_same_images_and_none_that_it_learnt_from(answers):
    table, section = answers
    names = ["as it was", *(f"{way} on {n}" for n in (8, 16) for way in ("recalibrated", "fine-tuned"))]
    parts = [table[table["variant"] == f"recipe: harbour {name}"] for name in names]
    assert all(len(part) for part in parts)
    assert len({tuple(sorted(part["image"])) for part in parts}) == 1
    local = choose_local([f"harbour-{n:04d}" for n in range(24)], 16, section.split)
    assert not set(parts[0]["subject"]) & set(local)
    assert {"north", "east", "harbour"} == set(parts[0]["site"])


def test_recalibration_keeps_the_order_of_the_scores_and_fine_tuning_does_not(answers):
    table, _ = answers
    was, again, tuned = (
        table[table["variant"] == f"recipe: harbour {name}"].set_index("image")["score"].sort_index()
        for name in ("as it was", "recalibrated on 16", "fine-tuned on 16")
    )
    assert was.corr(again, method="spearman") == pytest.approx(1, abs=1e-6)
    assert was.corr(tuned, method="spearman") < 1 - 1e-6


def test_more_local_subjects_include_fewer_and_a_fourth_validates():
    how = SplitSection(seed=1, train=0.6, validation=0.2)
    names = [f"s{n}" for n in range(40)]
    few, many = choose_local(names, 8, how), choose_local(names[::-1], 20, how)
    assert set(few) < set(many)
    assert list(many.values()).count("validation") == 5


def test_a_split_takes_local_subjects_and_leaves_a_site_out():
    table = pd.DataFrame({
        "subject": [f"{site}-{n}" for site in ("north", "east", "harbour") for n in range(40)],
        "site": ["north"] * 40 + ["east"] * 40 + ["harbour"] * 40,
        "site_kind": ["internal"] * 80 + ["external"] * 40,
    })  # fmt: skip
    how = SplitSection(seed=1, train=0.6, validation=0.2, local={"harbour": 20}, left_out=("east",))
    told = split_table(how, table)
    assert set(told.loc[told["site"] == "east", "split"]) == {"external"}
    here = told.loc[told["site"] == "harbour", "split"].value_counts().to_dict()
    assert here == {"external": 20, "train": 15, "validation": 5}
