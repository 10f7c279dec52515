"""The packaged engine on its locked sets: the same statement each time, and no measured time in it."""

import json
import shutil

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from imaging.config import Places
from imaging.vocabulary import Kind
from training.evaluation import evaluate


def change(section, **told):
    return section.model_copy(update={"evaluate": section.evaluate.model_copy(update=told)})


@pytest.fixture
def copied(built, tmp_path):
    """The stages of the session's package, to evaluate again without touching it."""
    places, section, _ = built
    shutil.copytree(places.build, tmp_path / "build")
    return Places(root=places.root, build=tmp_path / "build", var=tmp_path / "var"), section


def test_two_evaluations_write_the_same_bytes(built, copied):
    places, section = copied
    evaluate(places, "tiny", section)
    for name in ("evaluation.json", "report.html"):
        first = built[0].stage("tiny", "evaluate") / name
        assert (places.stage("tiny", "evaluate") / name).read_bytes() == first.read_bytes()


def test_what_the_machine_took_lies_beside_and_never_in_the_statement(built):
    places, _, digest = built
    told = json.loads((places.var / "host" / "tiny-cost.json").read_text())
    assert told["package"] == digest
    assert told["predict"]["ms_per_image"] > 0
    assert told["fit"] == json.loads((places.stage("tiny", "fit") / "cost.json").read_text())
    body = json.loads((places.stage("tiny", "evaluate") / "evaluation.json").read_text())
    assert not {"fit", "predict", "cost", "seconds"} & set(body)


def test_the_estimates_are_those_of_the_listed_predictions(built):
    places, section, _ = built
    body = json.loads((places.stage("tiny", "evaluate") / "evaluation.json").read_text())
    table = pd.DataFrame(body["predictions"])
    assert set(body["sites"]) == set(table["site"])
    for where, told in {"overall": body["overall"], **body["sites"]}.items():
        rows = table[table["split"] == "test"] if where == "overall" else table[table["site"] == where]
        if section.kind is Kind.CLASSIFICATION:
            assert told["auc"]["estimate"] == pytest.approx(roc_auc_score(rows["truth"], rows["probability"]))
        else:
            assert told["surface_mm_rim"]["estimate"] == pytest.approx(
                rows["surface_mm_rim"].mean(), abs=1e-5
            )


def test_a_cohort_of_one_site_has_no_external_set_and_masks_may_be_missing(copied):
    places, section = copied
    path = places.stage("tiny", "split") / "manifest.parquet"
    table = pd.read_parquet(path)
    table = table[table["site"] == "north"]
    if section.kind is Kind.CLASSIFICATION:
        table = table.assign(mask=None)
    table.to_parquet(path, index=False)
    body = evaluate(places, "tiny", change(section, lesion_mm=(10.0,)))
    assert set(body["sets"]) == {"test"}
    assert set(body["sites"]) == {"north"}
    assert body["gap"] == {}
    assert ("lesion_size" in body["subgroups"]) == (section.kind is Kind.SEGMENTATION)
    assert "no external site" in (places.stage("tiny", "evaluate") / "report.html").read_text()


def test_robustness_is_measured_where_it_is_asked_for(copied):
    places, section = copied
    how = section.evaluate.robustness
    few = how.model_copy(update={"subjects": 6, "families": ("noise", "blur"), "severities": (5,)})
    body = evaluate(places, "tiny", change(section, robustness=few))
    assert {cell["family"] for cell in body["robustness"]["cells"]} == {"noise", "blur"}
    page = places.stage("tiny", "evaluate") / "report.html"
    assert "Robustness" in page.read_text()
    none = how.model_copy(update={"subjects": 0})
    assert "robustness" not in evaluate(places, "tiny", change(section, robustness=none))
    assert "Robustness" not in page.read_text()
