"""pairs.csv as spreadsheets and people leave it, and the lower bound of an accuracy."""

import json

import pytest

from wsl_d2.duplicates.judgements import duplicated_images, lower_bound_accuracy, read_correct
from wsl_d2.errors import UserError

PLAIN = (
    "evaluation,pretraining,score,hash_distance,cosine,judged\ne0,p0,1.0,0,,no\ne1,p1,0.9,3,0.5,yes\ne2,p2,0.9,3,,\n"
)


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.replace("\n", "\r\n").encode("utf-8-sig"),
        PLAIN.replace(",", "\t").encode("utf-16"),  # a spreadsheet's "Unicode text"
        PLAIN.replace(",", ";").replace(".", ",").replace("\n", ";\n").encode(),  # where the comma is in numbers
        b"sep=;\n" + PLAIN.replace(",", ";").encode(),
        ('"' + PLAIN.strip().replace(",", '","').replace("\n", '"\n"') + '"').encode(),
        (PLAIN + ",,,,, ,\n\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.replace(",no\n", ", NO \n").replace(",yes\n", ",Y\n").encode(),
        PLAIN.replace(",no\n", ",n\n").replace(",yes\n", ",TRUE\n").encode(),
        b"Judged,pretraining,Evaluation\nno,p0,e0\nyes,p1,e1\n,p2,e2\n",
        b"evaluation,pretraining,note,judged\ne0,p0,,no\ne1,p1\ne2,p2,far\n",  # empty cells at the end left out
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path, data):
    path = tmp_path / "pairs.csv"
    path.write_bytes(data)
    assert duplicated_images(path) == {"e1", "e2"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PLAIN.replace(",yes", ",maybe").encode(), "row 3, column judged: 'maybe' is neither yes nor no"),
        (PLAIN.replace("e1", "").encode(), "row 3, column evaluation is empty"),
        (PLAIN.replace("p1", "p,1").encode(), "row 3, column 7: 'yes' stands under no name"),
        (PLAIN.replace("judged", "verdict").encode(), "has no column 'judged'; it has 'evaluation', .* 'verdict'"),
        (PLAIN.replace("cosine", "judged").encode(), "has two columns 'judged'"),
        (b"", "has no column 'evaluation'; it is empty"),
        (PLAIN.replace("e1", "gr\xfcn").encode("latin-1"), "row 3 is not UTF-8"),
        (PLAIN.replace("p2", "p1").replace("e2", "e1").replace("3,,\n", "3,,no\n").encode(),
         "rows 3 and 4 judge the same pair differently"),
        (PLAIN.replace("e1", '"' + 200_000 * "e").encode(), "row 3 .*field"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, data, message):
    path = tmp_path / "pairs.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"pairs.csv.* {message}"):
        duplicated_images(path)


def test_an_image_is_duplicated_if_one_of_its_pairs_is_right(tmp_path):
    (tmp_path / "pairs.csv").write_text("evaluation,pretraining,judged\ne0,p0,no\ne0,p1,yes\ne1,p2,no\n")
    assert duplicated_images(tmp_path / "pairs.csv") == {"e0"}


def test_lower_bound():
    correct = {"a": True, "b": True, "c": False, "d": True}
    assert lower_bound_accuracy(correct, {"a", "c"}) == (75.0, 50.0, 2)
    with pytest.raises(UserError, match="'q' is duplicated and has no result"):
        lower_bound_accuracy(correct, {"q", "a"})
    with pytest.raises(UserError, match="no evaluation image has a result"):
        lower_bound_accuracy({}, set())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"e0": true, "e1": "no", "e2": 1}', r"'e1' \(as 1 more\) is \"no\", neither true nor false"),
        ('{"e0": true, "e1": null}', "'e1' is null, neither true nor false"),
        ('[["e0", true]]', "holds no JSON object"),
        ('{"e0": true', "cannot be read as JSON"),
        ('{"e0": true, "e0": false}', "'e0' occurs twice"),
        ('{"e0": true, "e7": true, "e8": false}', r"'e7' \(as 1 more\) is no evaluation image"),
    ],
)
def test_results_that_cannot_be_used_are_named(tmp_path, content, message):
    path = tmp_path / "correct.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"correct.json.*{message}"):
        read_correct(path, ["e0", "e1", "e2"])
    path.write_text(json.dumps({"e0": True}), encoding="utf-8-sig")
    assert read_correct(path) == {"e0": True}
